"""The command line: each file holds one command, which parses, calls the library and prints."""

from typing import Annotated

import typer

from rootflow import __version__
from rootflow.cli import given
from rootflow.cli.classify import classify
from rootflow.cli.common import Commands, Wide
from rootflow.cli.compare import compare
from rootflow.cli.data import data
from rootflow.cli.fit import fit
from rootflow.cli.flows import flows
from rootflow.cli.report import report
from rootflow.cli.reproduce import reproduce
from rootflow.cli.sample import sample
from rootflow.cli.score import score
from rootflow.cli.vi import vi

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=Wide,
    rich_markup_mode="markdown",
)
for command in (fit, score, sample, compare, report, classify, vi, reproduce, flows):
    app.command()(command)
app.add_typer(data, name="data")


def _version(asked: bool) -> None:
    if asked:
        print(f"rootflow {__version__}")
        raise typer.Exit


@app.callback()
def overview(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: given.Debug = False,
) -> None:
    """Learn the density of a table, then score, sample and check it.

    Results go to stdout, progress and warnings to stderr. Start with: rootflow fit galaxies
    """


def main() -> None:
    """Run the command line; exits with 0 done, 1 failed, 2 wrong use, 130 and 143 interrupted."""
    app(prog_name="rootflow")
