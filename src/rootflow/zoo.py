"""The registry: the one list of flows behind the command line, tests, benchmarks and docs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .bases import BASES, Uniform
from .errors import CheckpointError
from .flow import Flow
from .store import Budget, fill, read_directory
from .transforms import (
    Compose,
    ImplicitBlock,
    Logit,
    MonotoneBlock,
    ResidualBlock,
    Standardise,
    Transform,
    glow,
    glow_images,
    iaf,
    maf,
    mixing,
    multiscale,
    nice,
    nsf_ar,
    nsf_coupling,
    realnvp,
)
from .transforms.continuous import ffjord
from .transforms.convex import cpflow
from .transforms.planar import planar
from .transforms.radial import radial
from .transforms.sigmoidal import naf
from .transforms.sylvester import sylvester

__all__ = ["ZOO", "Entry", "build", "flow", "flows", "load"]


@dataclass(frozen=True)
class Entry:
    """What the library knows about one family: how to build it and how to describe it.

    ``build`` is for tables and ``build_images``, where there is one, for images.
    """

    name: str
    summary: str
    build: Callable[..., list[Transform]]
    forward: str
    inverse: str
    log_det: str
    source: str
    build_images: Callable[..., list[Transform]] | None = None

    def options(self, images: bool = False) -> dict[str, Any]:
        """Options of this flow, for tables or for images, and their defaults.

        Raises ValueError naming the flows of images if this is none.
        """
        build = self.build_images if images else self.build
        if build is None:
            known = ", ".join(e.name for e in ZOO.values() if e.build_images is not None)
            raise ValueError(f"flow={self.name!r} takes no images; choose one of {known}")
        parameters = inspect.signature(build).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {**own, **({"alpha": 1e-6} if images else {}), "base": "normal"}


def _blocks(kind: Callable[..., Transform], blocks: int) -> Callable[..., list[Transform]]:
    def build(
        features: int,
        context: int = 0,
        *,
        blocks: int = blocks,
        hidden: Sequence[int] = (128, 128),
        activation: str = "sin",
        lipschitz: float = 0.97,
        actnorm: bool = True,
        linear: str | None = "lu",
        solver: str = "auto",
        logdet: str = "auto",
        terms: int = 4,
        probes: int = 1,
    ) -> list[Transform]:
        if blocks < 1:
            raise ValueError(f"blocks={blocks} must be at least 1")
        options = {
            "activation": activation, "lipschitz": lipschitz, "context": context, "solver": solver,
            "logdet": logdet, "terms": terms, "probes": probes,
        }  # fmt: skip
        chain: list[Transform] = []
        for _ in range(blocks):
            chain += mixing(features, actnorm, linear)
            chain.append(kind(features, hidden, **options))
        return [*chain, *mixing(features, actnorm, linear)]

    return build


def _image_blocks(kind: Callable[..., Transform], blocks: int) -> Callable[..., list[Transform]]:
    def build(
        shape: tuple[int, int, int],
        *,
        scales: int | None = None,
        blocks: int = blocks,
        hidden: Sequence[int] = (64, 64),
        preactivation: bool = False,
        activation: str = "lipswish",
        lipschitz: float = 0.9,
        actnorm: bool = True,
        linear: str | None = "lu",
        factor_out: bool = False,
        solver: str = "auto",
        logdet: str = "geometric",
        terms: int | None = None,
        probes: int = 1,
        save_memory: bool = True,
    ) -> list[Transform]:
        if blocks < 1:
            raise ValueError(f"blocks={blocks} must be at least 1")
        options = {
            "activation": activation, "lipschitz": lipschitz, "solver": solver, "logdet": logdet,
            "terms": terms, "probes": probes, "save_memory": save_memory,
        }  # fmt: skip

        sides = shape[1:]

        def level(shape: tuple[int, int, int]) -> list[Transform]:
            chain: list[Transform] = []
            for k in range(blocks):
                chain += mixing(shape, actnorm, linear)
                after = preactivation and (k > 0 or shape[1:] != sides)
                chain.append(kind(shape, hidden, **options, preactivation=after))
            return [*chain, *mixing(shape, actnorm, None)]

        return multiscale(shape, scales, level, factor_out)

    return build


LOG_DET = "exact; estimated without bias for images, and for training beyond 64 columns"

ZOO = {
    e.name: e
    for e in (
        Entry(
            "implicit",
            "x + g_x(x) = z + g_z(z): the widest class per block, two networks each",
            _blocks(ImplicitBlock, 4),
            "root find", "root find", LOG_DET, "Lu et al. 2021, arXiv:2103.09527",
            _image_blocks(ImplicitBlock, 2),
        ),
        Entry(
            "residual",
            "z = x + g(x): no solve to score, one to sample",
            _blocks(ResidualBlock, 8),
            "closed", "root find", LOG_DET, "Chen et al. 2019, arXiv:1906.02735",
            _image_blocks(ResidualBlock, 4),
        ),
        Entry(
            "monotone",
            "Cayley form of a strongly monotone map: slopes of an implicit block, one network",
            _blocks(MonotoneBlock, 8),
            "root find", "root find", LOG_DET, "Ahn et al. 2022, NeurIPS",
            _image_blocks(MonotoneBlock, 4),
        ),
        Entry(
            "nice",
            "additive couplings and a final scale: the simplest network flow",
            nice,
            "closed", "closed", "exact", "Dinh et al. 2015, arXiv:1410.8516",
        ),
        Entry(
            "realnvp",
            "affine couplings: cheap in both directions",
            realnvp,
            "closed", "closed", "exact", "Dinh et al. 2017, arXiv:1605.08803",
        ),
        Entry(
            "glow",
            "affine couplings with ActNorm and permuted LU maps between them",
            glow,
            "closed", "closed", "exact", "Kingma and Dhariwal 2018, arXiv:1807.03039",
            glow_images,
        ),
        Entry(
            "nsf-coupling",
            "rational-quadratic spline couplings: flexible, and as fast to sample as to score",
            nsf_coupling,
            "closed", "closed", "exact", "Durkan et al. 2019, arXiv:1906.04032",
        ),
        Entry(
            "maf",
            "each column an affine map given by those before it: scores in one pass",
            maf,
            "closed", "closed, column by column", "exact",
            "Papamakarios et al. 2017, arXiv:1705.07057",
        ),
        Entry(
            "iaf",
            "maf turned around: samples in one pass, made for variational fits",
            iaf,
            "closed, column by column", "closed", "exact", "Kingma et al. 2016, arXiv:1606.04934",
        ),
        Entry(
            "nsf-ar",
            "each column a spline given by those before it: the most flexible closed form",
            nsf_ar,
            "closed", "closed, column by column", "exact",
            "Durkan et al. 2019, arXiv:1906.04032",
        ),
        Entry(
            "naf",
            "each column through a rising network given by those before it",
            naf,
            "closed", "root find, column by column", "exact",
            "Huang et al. 2018, arXiv:1804.00779",
        ),
        Entry(
            "ffjord",
            "follows a learned velocity field; needs torchdiffeq",
            ffjord,
            "ODE", "ODE", "exact trace, integrated to the error of the steps",
            "Grathwohl et al. 2019, arXiv:1810.01367",
        ),
        Entry(
            "cpflow",
            "gradients of convex functions: the maps of optimal transport",
            cpflow,
            "closed", "root find", "exact; estimated without bias for training beyond 16 columns",
            "Huang et al. 2021, arXiv:2012.05942",
        ),
        Entry(
            "planar",
            "bends along one direction a layer: small, fast to sample, made for variational fits",
            planar,
            "root find", "closed", "exact", "Rezende and Mohamed 2015, arXiv:1505.05770",
        ),
        Entry(
            "radial",
            "stretches and squeezes around one centre a layer",
            radial,
            "closed", "closed", "exact", "Rezende and Mohamed 2015, arXiv:1505.05770",
        ),
        Entry(
            "sylvester",
            "bends along several directions a layer, which act on one another",
            sylvester,
            "root find", "closed", "exact", "van den Berg et al. 2018, arXiv:1803.05649",
        ),
    )
}


def flow(
    name: str,
    features: int | None = None,
    context: int = 0,
    *,
    shape: Sequence[int] | None = None,
    **options: Any,
) -> Flow:
    """Build a flow by name.

    ``features``: columns of the data; ``context``: width of what it is conditioned on. Options are
    those of ``flows()``; with ``tails`` other than "linear" the data are taken as they are and live
    on [-interval, interval]. ``shape`` instead of ``features``: images (channels, height, width)
    with values in [0, 1], which are mapped to the reals by a logit with ``alpha``; no context.
    Raises ValueError naming the valid names or options.
    """
    if name not in ZOO:
        raise ValueError(f"flow={name!r} is unknown; choose one of {', '.join(ZOO)}")
    if (features is None) == (shape is None):
        raise ValueError("give either features, the number of columns, or the shape of images")
    entry = ZOO[name]
    known = entry.options(images=shape is not None)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(known)}")
    for key, value in options.items():
        if isinstance(known[key], tuple) and isinstance(value, int):
            options[key] = (value,)  # one width
        elif isinstance(known[key], int | float) and not isinstance(value, int | float):
            raise ValueError(f"{key}={value!r} cannot be used; give a number such as {known[key]}")
    options = {**known, **options}
    base = options["base"]
    if base not in BASES:
        raise ValueError(f"base={base!r} is unknown; choose one of {', '.join(BASES)}")
    if shape is not None:
        return _of_images(entry, tuple(shape), context, options)
    assert features is not None
    if not hasattr(features, "__index__") or features < 1 or context < 0:
        raise ValueError(
            f"features={features!r}, context={context!r}: "
            "give a whole number of at least one feature, no negative context"
        )
    features = int(features)
    recipe = {"name": name, "features": features, "context": context, "options": dict(options)}
    options.pop("base")
    tails = options.get("tails", "linear")
    if tails != "linear" and base != "normal":
        raise ValueError(
            f"base={base!r}: with tails={tails!r} the base is uniform on the interval; leave it out"
        )
    chain = entry.build(features, context, **options)
    if tails == "linear":
        return Flow(Compose([Standardise(features), *chain]), BASES[base]((features,)), recipe)
    # These maps keep the interval in the units of the data, so nothing may move them before.
    return Flow(Compose(chain), Uniform((features,), options["interval"]), recipe)


def _of_images(
    entry: Entry, shape: tuple[int, ...], context: int, options: dict[str, Any]
) -> Flow:
    if len(shape) != 3 or min(shape) < 1 or context:
        raise ValueError(
            f"shape={shape}, context={context}: images are (channels, height, width), without "
            "context"
        )
    assert entry.build_images is not None
    recipe = {"name": entry.name, "shape": list(shape), "options": dict(options)}
    base, alpha = BASES[options.pop("base")], options.pop("alpha")
    chain = entry.build_images(shape, **options)
    return Flow(Compose([Logit(shape, alpha), *chain]), base(shape), recipe)


def flows() -> list[dict[str, Any]]:
    """What each registered flow is: name, summary, cost of each direction, options, source.

    ``image_options`` is None for flows of tables alone.
    """
    return [
        {
            "name": e.name, "summary": e.summary, "forward": e.forward, "inverse": e.inverse,
            "log_det": e.log_det, "options": e.options(), "source": e.source,
            "image_options": e.options(images=True) if e.build_images is not None else None,
        }
        for e in ZOO.values()
    ]


def build(recipe: Mapping[str, Any]) -> Flow:
    """The untrained flow that ``recipe``, as every flow of the registry holds one, describes."""
    size = {key: recipe.get(key) for key in ("features", "shape")}
    context, options = recipe.get("context", 0), recipe.get("options", {})
    return flow(recipe["name"], context=context, **size, **options)


def load(directory: str | Path, device: str | torch.device | None = None) -> Flow:
    """Read a flow that ``Flow.save`` or a fit wrote, strictly.

    Its sizes are compared with those of the weights before anything large is built. Raises
    CheckpointError for a missing, damaged, foreign or newer directory.
    """
    config, tensors = read_directory(Path(directory))
    elements = sum(t.numel() for t in tensors.values())
    try:
        _check_recipe(config["flow"], len(tensors), elements)
        with torch.random.fork_rng(devices=[]), Budget(elements):  # what is drawn is replaced
            built = build(config["flow"])
    except Exception as error:  # a foreign recipe can fail anywhere in a constructor
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{directory}: config.json does not describe a known flow: {reason}"
        ) from None
    fill(built, tensors, Path(directory))
    return built.to(device).eval()


def _check_recipe(recipe: Mapping[str, Any], tensors: int, elements: int) -> None:
    """Raise ValueError for unknown entries, and for numbers that no such file can have."""
    if unknown := sorted(set(recipe) - {"name", "features", "shape", "context", "options"}):
        raise ValueError(f"unknown entry {unknown[0]!r}")
    options = recipe.get("options", {})
    if max(int(options.get("blocks", 1)), len(options.get("hidden", ()))) > max(tensors, 100):
        raise ValueError("more blocks or layers than tensors")
    for value in tree_leaves(dict(recipe)):
        if isinstance(value, int) and value > max(elements, 10**4):
            raise ValueError(f"the size {value} is larger than the file")
