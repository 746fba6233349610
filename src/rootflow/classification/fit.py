"""Making, training, saving and loading classifiers; the training loop is that of the flows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import Images
from ..errors import CheckpointError, DataError
from ..store import Budget, fill, read_directory, save_directory
from ..training import FitConfig, History
from ..training import fit as fit_rows
from .network import Classifier

__all__ = ["DEFAULTS", "fit", "load", "make", "save"]

# Settings of the fit that differ from those for flows; batches and rate are the published ones.
DEFAULTS: dict[str, Any] = {"batch_size": 128, "lr": 1e-3, "ema": 0.999, "flip": True}
RENEWAL = 100  # batches


def make(
    images: Images, block: str, seed: int = 0, *, c: float = 0.9, width: float = 1.0, pool: int = 1
) -> Classifier:
    """An untrained classifier for these images, its weights drawn from ``seed`` alone.

    Raises DataError for images without labels, ValueError for options that do not fit.
    """
    if images.labels is None:
        raise DataError(f"{images.name}: comes without labels; classes are subfolders of a folder, "
                        f"or the array labels of a .npz")  # fmt: skip
    classes = int(images.labels.max()) + 1
    if classes < 2:
        raise DataError(f"{images.name}: has one class only; two are needed")
    return _build(
        seed, event=images.shape, classes=classes, block=block, c=c, width=width, pool=pool,
        levels=images.levels,
    )  # fmt: skip


def _build(seed: int, **recipe: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Classifier(**recipe)


def part(images: Images, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pixels uint8 ``(n, c, h, w)`` and labels int64 ``(n,)`` of train, validation or test."""
    rows = getattr(images, name)
    assert images.labels is not None
    pixels, labels = torch.from_numpy(images.pixels[rows]), torch.from_numpy(images.labels[rows])
    return pixels.to(device), labels.to(device)


def fit(
    model: Classifier,
    images: Images,
    config: FitConfig,
    *,
    checkpoint: Path | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Maximise the mean log-probability of the labels in place; the validation images select.

    Everything as ``rootflow.fit`` does it, resuming included; the test images are not touched. At
    the end the statistics of the batch normalisations are taken anew for the selected weights.
    """
    device = next(model.parameters()).device
    pixels, labels = part(images, "train", device)
    held_out, held_out_labels = part(images, "validation", device)
    history = fit_rows(
        cast(Any, model),  # a density of labels: it has all that the loop asks of a flow
        pixels, held_out, config=config, context=labels, validation_context=held_out_labels,
        checkpoint=checkpoint, on_record=on_record, should_stop=should_stop,
    )  # fmt: skip
    if history.stopped != "interrupted":
        _renew_statistics(model, pixels, config)
    return history


@torch.no_grad()
def _renew_statistics(model: Classifier, pixels: Tensor, config: FitConfig) -> None:
    """Mean and variance of every normalised layer over training images, for averaged weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(config.seed))
    model.train()
    for k, rows in enumerate(torch.split(order, config.batch_size)[:RENEWAL]):
        model.draws = k
        model(pixels[rows.to(pixels.device)])
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def save(model: Classifier, directory: Path) -> None:
    """Write config.json, model.safetensors and manifest.json for ``load``."""
    save_directory(directory, model.recipe, model.state_dict())


def load(directory: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """A classifier that ``save`` or ``rootflow classify`` wrote. Raises CheckpointError."""
    config, tensors = read_directory(Path(directory))
    recipe = config["flow"]
    if recipe.get("name") != "classifier":
        raise CheckpointError(f"{directory}: holds a flow; read it with rootflow.load")
    try:
        with Budget(sum(t.numel() for t in tensors.values())):
            model = _build(0, **{key: value for key, value in recipe.items() if key != "name"})
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory}: config.json does not describe a classifier: "
                              f"{reason}") from None
    fill(model, tensors, Path(directory))
    return model.to(device).eval()
