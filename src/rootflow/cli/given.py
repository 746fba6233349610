"""What commands can be given: the options that several of them share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsIs", "Columns", "Debug", "Device", "Json", "Kinds", "Memory", "Minutes", "Missing", "Out",
    "OwnSeed", "Quiet", "Resume", "Run", "Seed", "Set", "Steps", "Threads",
]  # fmt: skip


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    context.meta["debug"] = context.meta.get("debug", False) or debug
    return debug


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31, help="Seed of all random numbers.")]
OwnSeed = Annotated[int | None, typer.Option(min=0, help="Seed.  [default: 0]")]
Run = Annotated[Path, typer.Argument(help="Directory that `rootflow fit` wrote.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory of the run.  [default: a new one in runs/]")
]
Minutes = Annotated[
    float | None, typer.Option(help="Budget of time.  [default: 5, without another]")
]
Steps = Annotated[int | None, typer.Option(help="Budget of training steps.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Option of the flow or fit; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of torch.  [default: as torch chooses]")
]
Columns = Annotated[str | None, typer.Option(help="Use these columns only: a,b,c.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", metavar="NAME=KIND", help="What a column is, instead of what its "
                 "numbers say: continuous, positive, bounded:A,B, circular:A,B, integer, grid:GAP, "
                 "mass:A, category, ordered:a<b<c; repeatable."),
]  # fmt: skip
Missing = Annotated[
    str,
    typer.Option(help="Empty cells: keep them as a value of their own, drop their rows, refuse "
                 "them; auto keeps them where they are common."),
]  # fmt: skip
AsIs = Annotated[
    bool, typer.Option("--as-is", help="Take all columns as free real numbers, as they are.")
]
Memory = Annotated[
    float | None,
    typer.Option(min=0, metavar="GIB", help="Keep a larger table in a temporary file.  "
                 "[default: half of the machine's]"),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error."
    ),
]
