"""``rootflow data``: which tables and images come with rootflow."""

import typer

from rootflow.cli.common import Debug, Json, print_grid, print_json
from rootflow.data import BUILTIN, IMAGES

__all__ = ["data"]

data = typer.Typer(help="Tables and images that come with rootflow.", no_args_is_help=True)


@data.callback()
def overview() -> None:
    """Tables and images that come with rootflow."""


@data.command("list")
def list_builtin(as_json: Json = False, debug: Debug = False) -> None:
    """List the built-in names that DATA can be; NAME:ROWS sets the rows of a toy."""
    kinds = {"data": BUILTIN, "images": IMAGES}
    if as_json:
        print_json({
            kind: [{"name": n, "summary": text} for n, text in known.items()]
            for kind, known in kinds.items()
        })  # fmt: skip
    else:
        print_grid([[n, text] for known in kinds.values() for n, text in known.items()])
