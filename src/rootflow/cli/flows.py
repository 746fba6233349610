"""``rootflow flows``: the flows of this version and their options."""

from collections.abc import Mapping

import rootflow
from rootflow.cli import given
from rootflow.cli.common import print_grid, print_json

__all__ = ["flows"]


def flows(as_json: given.Json = False, debug: given.Debug = False) -> None:
    """List the flows, what each direction costs, and the options that --set takes."""
    entries = rootflow.flows()
    if as_json:
        print_json({"flows": entries})
        return
    for entry in entries:
        images = entry["image_options"]
        print(f"{entry['name']}: {entry['summary']}")
        print_grid([
            ["  to score", entry["forward"]],
            ["  to sample", entry["inverse"]],
            ["  log-determinant", entry["log_det"]],
            ["  options", _options(entry["options"])],
            *([["  options for images", _options(images)]] if images else []),
            ["  source", entry["source"]],
        ])  # fmt: skip


def _options(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in options.items())


def _word(value: object) -> str:
    """The value as --set takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
