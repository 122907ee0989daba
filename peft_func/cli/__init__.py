"""The command line: `peft-func`."""
