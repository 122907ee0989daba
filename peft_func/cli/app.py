"""The commands of the command line, one file each."""

from typing import Annotated

import typer

import peft_func as pf
from peft_func.cli.demo import demo

app = typer.Typer(
    name="peft-func",
    help="Parameter-efficient fine-tuning as pure functions over trees of weights.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # an error is one plain line, also in a pipe
    pretty_exceptions_enable=False,
)
app.command()(demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-func {pf.__version__}")
        raise typer.Exit


# A callback also keeps the name of a command needed while there is only one.
@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
