"""``rootflow score``: the log-density of each row of a table under a fitted flow."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import rootflow
from rootflow.cli import given
from rootflow.cli.common import machine, print_json, say
from rootflow.cli.inputs import are_images, image_set, schema_of
from rootflow.cli.measure import log_density
from rootflow.cli.run import open_run
from rootflow.cli.tables import byte_count, read_rows
from rootflow.data.rows import pieces
from rootflow.errors import DataError
from rootflow.store import write_atomically
from rootflow.training.scores import score_images
from rootflow.transforms import Pixels

__all__ = ["score"]


def score(
    run: given.Run,
    data: Annotated[str, typer.Argument(help="A file or a built-in name with the same columns.")],
    out: Annotated[Path | None, typer.Option(help="Write the CSV there, not to stdout.")] = None,
    memory: given.Memory = None,
    threads: given.Threads = None,
    device: given.Device = "cpu",
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Print the log-density of each row in nats, as CSV; low values are outliers.

    Columns are matched by name. A row outside the bounds or levels of the fit gets -inf, one whose
    equations could not be solved nan. Images have their bits per dimension beside it.
    """
    where = machine(device, threads)
    flow, plan = open_run(run, where)
    data_plan = plan["data"]
    if "shape" in data_plan:
        _score_images(run, flow, data_plan, data, out, as_json)
        return
    schema = schema_of(data_plan)
    mixed = None if data_plan.get("as_is", True) else schema.reading()
    seed = data_plan.get("seed", 0)
    limit = byte_count(memory)
    table = read_rows(data, schema.names, seed, limit, mixed)
    exact = copy.deepcopy(flow).double()
    parts = [log_density(exact, torch.from_numpy(block), schema, seed + k)[0]
             for k, block in enumerate(pieces(table.values))]  # fmt: skip
    values = torch.cat(parts)
    missed, outside = int(values.isnan().sum()), int((values == -math.inf).sum())
    if missed:
        say(f"warning: {missed:,} of {len(values):,} rows did not converge; their score is nan")
    if outside:
        say(f"warning: {outside:,} of {len(values):,} rows are impossible, with a score of -inf: "
            + schema.why_impossible(table.values))
    if out is not None:
        lines = "".join(f"{value!r}\n" for value in values.tolist())
        write_atomically(out, f"log_prob\n{lines}".encode())
    if as_json:
        good = values[values.isfinite()]
        print_json({
            "run": str(run), "data": table.name,
            "rows": len(values), "not_finite": len(values) - len(good),
            "mean": float(good.mean()) if len(good) else None,
            "standard_error": float(good.std()) / math.sqrt(len(good)) if len(good) > 1 else None,
            "lower_bound": bool(schema.noised),
            **({"log_prob": values.tolist()} if out is None else {"out": str(out)}),
        })  # fmt: skip
    elif out is None:
        print("log_prob")
        for value in values.tolist():
            print(repr(value))


def _score_images(
    run: Path, flow: rootflow.Flow, plan: Mapping[str, Any], source: str, out: Path | None,
    as_json: bool,
) -> None:
    """Nats and bits per dimension of each image; what the flow was not made for is refused."""
    images = image_set(source, plan["seed"]) if are_images(source) else None
    if images is None:
        raise DataError(f"{source}: holds no images; {run} is a flow of images")
    if list(images.shape) != plan["shape"] or images.levels != plan["levels"]:
        size, wanted = (" x ".join(map(str, s)) for s in (images.shape, plan["shape"]))
        raise DataError(
            f"{images.name}: {size} with {images.levels} levels; "
            f"the flow was fitted to {wanted} with {plan['levels']}"
        )
    pixels = Pixels(plan["levels"])
    scores = score_images(flow, torch.from_numpy(images.pixels), pixels, seed=plan["seed"])
    values = scores.log_prob.tolist()
    rows = [(value, pixels.bits_per_dim(value, flow.event)) for value in values]
    if missed := int(scores.log_prob.isnan().sum()):
        say(f"warning: {missed:,} of {len(rows):,} images did not converge; their score is nan")
    lines = ["log_prob,bits_per_dim", *(f"{value!r},{bits!r}" for value, bits in rows)]
    if out is not None:
        write_atomically(out, "".join(f"{line}\n" for line in lines).encode())
    if as_json:
        print_json({
            "run": str(run), "data": images.name, "rows": len(rows), "not_finite": missed,
            **scores.summary(),
            **({"scores": rows} if out is None else {"out": str(out)}),
        })  # fmt: skip
    elif out is None:
        print("\n".join(lines))
