"""What acts on activations: functions around modules, bottlenecks, prompts, representation edits, wiring."""
