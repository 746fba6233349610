"""Images learned by several flows for equal time, by the Lipschitz constant of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ..data import read_images
from ..errors import DataError, RootflowError
from ..flow import Flow
from ..plots import images as plots_images
from ..training import FitConfig
from ..training.config import FOR_IMAGES
from ..training.scores import score_images
from ..transforms import Pixels
from ..zoo import ZOO
from .fits import build, learn
from .parts import Count, Done, Job, Part, Positive, Row, Settings, Strict, among

__all__ = ["Family", "Images", "pooled"]

SHOWN = 10  # samples of each flow in the picture
LAYERS = 3  # of each network: kernels 3, 1, 3
Bytes = NDArray[np.uint8]


class Family(Strict):
    """A flow with its options; ``c``: once for each Lipschitz constant of a layer.

    The bound of a whole network is then c to the power of its layers.
    """

    c: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)


class Images(Settings):
    """Which images, which flows, and the budget of each fit: the first spent of the two.

    ``data``: a name of ``rootflow data list``, or "digits". ``pool``: average squares of so many
    pixels a side and round, for smaller images. ``test_images``: at most so many are scored.
    """

    data: str
    pool: Count = 1
    flows: dict[str, Family]
    fit: dict[str, Any] = Field(default_factory=dict)
    steps: Count | None = None
    seconds: Positive
    test_images: Count = 10_000

    @model_validator(mode="after")
    def _names_exist(self) -> Images:
        among(self.flows, [name for name, entry in ZOO.items() if entry.build_images is not None])
        among(self.fit, FitConfig.model_fields)
        for name, family in self.flows.items():
            among(family.options, ZOO[name].options(images=True))
        return self

    def _runs(self) -> Iterator[tuple[str, float | None]]:
        for name, family in self.flows.items():
            for c in family.c or (None,):
                yield name, c

    def minutes(self) -> float:
        return 1.1 * len(list(self._runs())) * self.seconds / 60

    def parts(self) -> Sequence[Part]:
        shared = self.model_dump(mode="json", exclude={"flows"})
        found = []
        for name, c in self._runs():
            options = dict(self.flows[name].options)
            if c is not None:
                options["lipschitz"] = c**LAYERS
            recipe = {**shared, "flow": name, "options": options}
            found.append(Part(_key(name, c), recipe, partial(self._study, name, options)))
        return found

    def _study(self, name: str, options: Mapping[str, Any], job: Job) -> dict[str, Any]:
        images = read_images(self.data)
        shape = tuple(images.pixels[:1].shape[1:])
        if any(side % self.pool for side in shape[1:]):
            raise DataError(f"{self.data}: sides of {shape} are no multiples of pool={self.pool}")
        train, validation, test = (
            torch.from_numpy(pooled(images.pixels[rows], self.pool))
            for rows in (images.train, images.validation, images.test[: self.test_images])
        )
        pixels = Pixels(images.levels)
        flow = build(name, tuple(train.shape[1:]), options, job.seed)
        budget = {**FOR_IMAGES, **self.fit, "seconds": self.seconds}
        budget |= {} if self.steps is None else {"steps": self.steps}
        _, facts = learn(flow, train, validation, budget, job.seed, job, pixels=pixels)
        found = score_images(flow, test, pixels, seed=job.seed).summary()
        if found["bits_per_dim"] is None:
            raise RootflowError("no held-out image has a finite density")
        job.keep(samples=pixels.quantise(_samples(flow, job.seed)), levels=np.array(images.levels))
        return {**found, **facts}

    def summarise(self, done: Mapping[str, Done], job: Job) -> Iterator[Row]:
        shown: dict[str, Any] = {}
        levels = 256
        for name, c in self._runs():
            part = done[_key(name, c)]
            labels = {"data": self.data, "flow": name, "c": "–" if c is None else f"{c:g}"}
            measure = "held-out bits per dimension"
            if part.error is not None:
                yield Row(labels=labels, measure=measure, error=part.error)
                continue
            r, arrays = part.result, part.shown()
            shown[_key(name, c)], levels = arrays["samples"], int(arrays["levels"])
            yield Row(
                labels=labels, measure=measure, ours=r["bits_per_dim"], se=r["bits_per_dim_se"],
                more={
                    "estimator se": r["bits_per_dim_estimator_se"], "parameters": r["parameters"],
                    "steps": r["steps"], "seconds": r["fit_seconds"],
                },
            )  # fmt: skip
        if shown:
            title = f"{self.data}: samples at a temperature of 0.8, from the same latents"
            job.draw("samples", plots_images.grid(shown, title, levels))


def _key(name: str, c: float | None) -> str:
    return name if c is None else f"{name}-{c:g}"


@torch.no_grad()
def _samples(flow: Flow, seed: int) -> Tensor:
    """Draws from latents that depend on the seed and the shape alone."""
    z = flow.base.sample((SHOWN,), torch.Generator().manual_seed(seed))  # type: ignore[operator]
    return flow.inverse(0.8 * z)[0].nan_to_num(0.0)


def pooled(pixels: Bytes, side: int) -> Bytes:
    """Means of squares of ``side`` pixels a side, rounded half to even; ``(n, c, h, w)``, uint8."""
    if side == 1:
        return pixels
    n, c, h, w = pixels.shape
    squares = pixels.reshape(n, c, h // side, side, w // side, side)
    means: Bytes = np.rint(squares.mean((3, 5))).astype(np.uint8)
    return means
