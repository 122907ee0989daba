"""The entry point `peft-func`: it imports with the core dependencies alone, and says so where that is not enough."""

import sys

from peft_func.cli.extras import require
from peft_func.errors import PeftFuncError


def run() -> None:
    """Run the command line on `sys.argv`.

    Raises:
        SystemExit: always, with 0 for success, 1 for a failure, 2 for a bad value on the command line.
    """
    try:
        require("typer")
        require("rich")
        from peft_func.cli.app import app  # needs both

        app(prog_name="peft-func")
    except (PeftFuncError, OSError) as error:
        sys.stderr.write(f"peft-func: error: {error}\n")
        raise SystemExit(1) from None
