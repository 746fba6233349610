"""``rootflow classify``: train a classifier with certified blocks, and write a run directory."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rootflow import classification
from rootflow.classification import BLOCKS, DEFAULTS, Classifier
from rootflow.cli import given
from rootflow.cli import run as runs
from rootflow.cli.common import WrongUse, machine, nats, print_grid, print_json, say
from rootflow.cli.inputs import enough_images, read_again
from rootflow.cli.settings import as_words, assign, merge_budget
from rootflow.cli.train import how_it_went, watched
from rootflow.data import Images
from rootflow.errors import RootflowError
from rootflow.report import write_report
from rootflow.store import write_json
from rootflow.training import FitConfig

__all__ = ["classify"]


def classify(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Argument(help="Images with labels: a name, a folder, a .npz.")
    ] = None,
    block: Annotated[str, typer.Option(help=f"{', '.join(BLOCKS[:-1])} or {BLOCKS[-1]}.")] = (
        "implicit"
    ),
    c: Annotated[
        float, typer.Option("--c", help="Bound on the norm of each convolution of the blocks.")
    ] = 0.9,
    width: Annotated[
        float, typer.Option(help="Share of the published numbers of channels.")
    ] = 0.125,
    pool: Annotated[int, typer.Option(min=1, help="Average squares of so many pixels.")] = 1,
    out: given.Out = None,
    minutes: given.Minutes = None,
    epochs: Annotated[
        float | None, typer.Option(help="Budget in passes over the training images.")
    ] = None,
    settings: given.Set = None,
    seed: given.OwnSeed = None,
    resume: given.Resume = False,
    threads: given.Threads = None,
    device: given.Device = "cpu",
    quiet: given.Quiet = False,
    as_json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Learn the classes of images; test error, calibration and certified Lipschitz constants.

    Ctrl-C saves the state; `rootflow classify --resume --out RUN` goes on from there.
    """
    where = machine(device, threads)
    if resume:
        out, plan, result = runs.resumed(context)
        if result is not None:
            _show(result, out, as_json)
            return
        images = read_again(plan["data"])
        assert isinstance(images, Images)
    else:
        if data is None:
            raise WrongUse("DATA is missing; give images with labels such as fashion-mnist")
        if epochs is not None and epochs <= 0:
            raise WrongUse(f"--epochs {epochs:g}: give more than 0")
        chosen = {**DEFAULTS, **assign(settings or [], FitConfig.model_fields)[1]}
        steps = None if epochs is None else 1
        config = merge_budget(FitConfig, chosen, minutes, steps, seed, default_minutes=5.0)
        images = enough_images(data, config.seed)
        if epochs is not None:
            steps = max(1, round(epochs * per_epoch(images, config)))
            config = config.model_copy(update={"steps": steps})
        options = {"c": c, "width": width, "pool": pool}
        plan = _plan(images, data, block, options, config)
        out = out or runs.default_path(data, block)
        runs.begin(out, plan)
    _show(_train(out, plan, images, where, quiet), out, as_json)


def per_epoch(images: Images, config: FitConfig) -> int:
    """Steps in one pass over the training images."""
    return max(1, len(images.train) // config.batch_size)


def _plan(
    images: Images, source: str, block: str, options: Mapping[str, Any], config: FitConfig
) -> dict[str, Any]:
    """What config.json of a new run says; also tries whether the network can be built."""
    try:
        recipe = classification.make(images, block, **options).recipe
    except RootflowError:
        raise
    except ValueError as error:
        raise WrongUse(str(error)) from None
    words = ["classify", source, "--block", block]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += as_words(config.model_dump(exclude_defaults=True))
    return runs.plan_of(words, config, flow=recipe,
                        data=runs.describe(images, source, config.seed, {}))  # fmt: skip


def _train(
    run: Path, plan: Mapping[str, Any], images: Images, device: torch.device, quiet: bool
) -> dict[str, Any]:
    """Fit, or go on fitting; measure. Returns the content of result.json."""
    config = FitConfig.model_validate(plan["fit"])
    recipe = plan["flow"]
    options = {name: recipe[name] for name in ("c", "width", "pool")}
    model: Classifier = classification.make(images, recipe["block"], config.seed, **options)
    model.to(device)
    save = partial(classification.save, model)
    with runs.kept(run, "classify"):
        fit = partial(classification.fit, model, images, config)
        history = watched(run, config, quiet, "classify", fit, save)
        if not quiet:
            say(f"measuring on {len(images.test):,} test images")
        result = {
            **recipe,
            "data": plan["data"]["name"],
            "n_train": len(images.train), "n_validation": len(images.validation),
            "n_test": len(images.test),
            "parameters": sum(p.numel() for p in model.parameters()),
            **how_it_went(history, config, device),
            "epochs": round(history.steps / per_epoch(images, config), 3),
            **classification.measure(model, images),
        }  # fmt: skip
        save(run)
        write_json(run / "result.json", result)
        write_report(run)
    return result


def _show(result: Mapping[str, Any], run: Path, as_json: bool) -> None:
    if as_json:
        print_json({**result, "run": str(run)})
        return
    restricted = "" if result["block"] == "vanilla" else f", c = {result['c']:g}"
    print_grid(list({
        "network": f"{result['block']}{restricted} on {result['data']}, "
        f"{result['parameters']:,} parameters",
        "images": f"{result['n_train']:,} train, {result['n_validation']:,} validation, "
        f"{result['n_test']:,} test; {result['classes']} classes",
        "test error": f"{nats(result['test_error'], result['test_error_se'])} %; "
        f"validation {result['validation_error']:.2f} %",
        "log-likelihood": f"{nats(result['test_log_prob'], result['test_log_prob_se'])} nats per "
        f"image; calibration error {result['calibration_error']:.3f}",
        "Lipschitz": f"branches at most {max(result['lipschitz']):.4g}, blocks at most "
        + ", ".join(f"{bound:.4g}" for bound in result["block_lipschitz"]) + ", certified",
        "training": f"{result['steps']:,} steps, {result['epochs']:.3g} epochs in "
        f"{result['seconds']:.4g} s, best at {result['best_step']:,}; "
        f"stopped by {result['stopped']}",
        "report": str(run / "report.html"),
    }.items()))  # fmt: skip
