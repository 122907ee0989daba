"""Many adapters at once: ensembles, routing, training side by side, statistics and arithmetic."""
