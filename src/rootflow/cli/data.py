"""``rootflow data``: which tables come with rootflow."""

import typer

from rootflow.cli.common import Debug, Json, print_grid, print_json
from rootflow.data import BUILTIN

__all__ = ["data"]

data = typer.Typer(help="Tables that come with rootflow.", no_args_is_help=True)


@data.callback()
def overview() -> None:
    """Tables that come with rootflow."""


@data.command("list")
def list_builtin(as_json: Json = False, debug: Debug = False) -> None:
    """List the built-in names that DATA can be; NAME:ROWS sets the rows of a toy."""
    if as_json:
        print_json({"data": [{"name": n, "summary": text} for n, text in BUILTIN.items()]})
    else:
        print_grid([[name, text] for name, text in BUILTIN.items()])
