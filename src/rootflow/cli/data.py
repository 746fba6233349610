"""``rootflow data``: which tables and images there are, and how published ones are prepared."""

from pathlib import Path
from typing import Annotated

import typer

from rootflow.cli import given
from rootflow.cli.common import print_grid, print_json, say
from rootflow.data import BUILTIN, IMAGES, PACKAGED, PREPARED
from rootflow.data import prepare as prepare_set
from rootflow.data.archives import cache_folder
from rootflow.data.images import DEBIAN

__all__ = ["data"]

data = typer.Typer(help="Tables and images: list, prepare.", no_args_is_help=True)


@data.callback()
def overview() -> None:
    """Tables and images: list, prepare."""


@data.command("list")
def list_known(as_json: given.Json = False, debug: given.Debug = False) -> None:
    """List the names that DATA can be; NAME:ROWS sets the rows of a toy."""
    kinds = {"data": {**BUILTIN, **PACKAGED, **PREPARED["table"]},
             "images": {**IMAGES, **PREPARED["images"]}}  # fmt: skip
    if as_json:
        print_json({
            kind: [{"name": n, "summary": text, "from": _origin(n)} for n, text in known.items()]
            for kind, known in kinds.items()
        })  # fmt: skip
        return
    for kind, known in kinds.items():
        print("tables:" if kind == "data" else "images:")
        print_grid([["", name, _origin(name), text] for name, text in known.items()])


def _origin(name: str) -> str:
    if name in BUILTIN or name in IMAGES:
        return "built in"
    if name in PACKAGED:
        return "other packages"
    if (cache_folder() / name).is_dir():
        return "prepared"
    return "Debian" if name == "fashion-mnist" and DEBIAN.is_dir() else "data prepare"


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(help="Which set; see `rootflow data list`.")],
    out: Annotated[
        Path | None, typer.Option(help="Parent folder.  [default: rootflow in the user's cache]")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Folder or URL of the published files, or the one file."),
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Accept files with other checksums.")
    ] = False,
    unpickle: Annotated[
        bool,
        typer.Option("--unpickle", help="For gas: read its pickle, letting arrays through only."),
    ] = False,
    quiet: given.Quiet = False,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Download a published data set, check it, and keep it as plain arrays.

    An interrupted download goes on when the command is repeated.
    """
    folder, found = prepare_set(
        name, out=out, source=source, verify=not unverified, unpickle=unpickle,
        say=(lambda _: None) if quiet else say,
    )  # fmt: skip
    parts = dict(zip(("train", "validation", "test") if found.kind == "table" else
                     ("train", "test"), found.parts, strict=True))  # fmt: skip
    note = found.note
    if as_json:
        print_json({**note, "parts": parts, "folder": str(folder)})
        return
    known_as = name if out is None else str(folder)
    shape = " x ".join(f"{size:,}" for size in note["shape"])
    checked = "as published" if note["verified"] else "not compared with a published checksum"
    print_grid([
        ["data", f"{shape}: " + ", ".join(f"{n:,} {part}" for part, n in parts.items())],
        ["files", checked],
        ["variant", f"{note['first_rows']} (SHA-256 of the first 100 rows)"],
        ["folder", str(folder)],
        ["use it", f"rootflow fit {known_as}"],
    ])  # fmt: skip
