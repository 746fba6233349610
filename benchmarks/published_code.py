"""Runs the published implicit-flow code, unmodified, for published.py.

The published training scripts are executed with zero iterations, which builds model and optimizer
exactly as published; a step then calls their own loss and Lipschitz update. Names the scripts
import but a training step never uses (plots, image folders, progress bars) are replaced while the
scripts load, so the clone needs nothing but torch and numpy.
"""

import collections.abc
import contextlib
import importlib.machinery
import logging
import math
import runpy
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # otherwise by the first optimizer, among modules replaced
from torch import Tensor

UNUSED = [
    *("matplotlib", "matplotlib.pyplot", "scipy", "scipy.optimize", "termcolor", "tqdm"),
    *("sklearn", "sklearn.datasets", "sklearn.utils", "torchvision", "torchvision.datasets"),
    *("torchvision.transforms", "torchvision.utils"),
]


@dataclass(frozen=True)
class Case:
    """One published experiment: how its script is called, and the same model in our words."""

    title: str
    shape: tuple[int, ...]  # of a row
    rows: int
    steps: int  # taken by default
    script: str
    arguments: str
    options: dict[str, Any]  # of rootflow.flow
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None


CASES = {
    "toy": Case(
        title="2-D checkerboard, batch 5000, 4 blocks, nets 2-128-128-2; exact log-det",
        shape=(2,),
        rows=5000,
        steps=100,
        script="train_toy.py",
        arguments="--nblocks 4 --vnorms 2222 --dims 128-128 --arch implicit --brute-force True "
        "--act sin --data checkerboard --batch_size 5000 --coeff 0.99 --n-lipschitz-iters 20 "
        "--niters 0",
        options={"blocks": 4, "hidden": (128,) * 2, "lipschitz": 0.99**3},
        weight_decay=1e-5,
    ),
    "power": Case(
        title="POWER shape, batch 1000, 20 blocks, nets 6-128-128-128-128-6; log-det: published "
        "roulette, rootflow default",
        shape=(6,),
        rows=1000,
        steps=40,
        script="train_tabular.py",
        arguments="--nblocks 20 --vnorms 222222 --dims 128-128-128-128 --act sin --data power "
        "--batchsize 1000 --coeff 0.99 --epsf 1e-5 --nepochs 0 --nworkers 0",
        options={"blocks": 20, "hidden": (128,) * 4, "lipschitz": 0.99**5},
        betas=(0.9, 0.99),
        clip=1.0,
    ),
    **{
        f"image{width}": Case(
            title=f"images 3x32x32, batch {rows}, blocks 2-2-2, {width} channels, kernels 3-1-3; "
            "log-det: 10 terms and a Poisson tail",
            shape=(3, 32, 32),
            rows=rows,
            steps=12,
            script="train_img.py",
            arguments="--data cifar10 --actnorm True --nblocks 2-2-2 --act swish --kernels 3-1-3 "
            "--vnorms 2222 --fc-end False --preact True --coeff 0.9 --n-exact-terms 10 --nepochs 0 "
            f"--nworkers 0 --idim {width} --batchsize {rows}",
            options={"hidden": (width,) * 2, "lipschitz": 0.9**3, "logdet": "poisson", "terms": 10},
            betas=(0.9, 0.99),
            clip=1.0,
        )
        for width, rows in ((128, 8), (512, 2))
    },
}


def batch(case: Case, generator: torch.Generator) -> Tensor:
    """Draws (rows, *shape): the checkerboard, a curved standardised table, or smooth pictures."""
    if len(case.shape) == 3:
        x = torch.randn(case.rows, 3, 8, 8, generator=generator)
        x = torch.nn.functional.interpolate(x, case.shape[1:], mode="bicubic")
        noise = torch.rand(case.rows, *case.shape, generator=generator)
        return ((255 * torch.sigmoid(1.5 * x)).floor() + noise) / 256
    (features,) = case.shape
    if features == 2:
        u = torch.rand(case.rows, 2, generator=generator)
        down = torch.randint(0, 2, (case.rows,), generator=generator)
        x1 = 4 * u[:, 0] - 2
        return 2 * torch.stack([x1, u[:, 1] - 2 * down + x1.floor() % 2], 1)
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(1))
    x = torch.randn(case.rows, features, generator=generator) @ mix
    x = x + 1.5 * torch.sin(2 * x.roll(1, 1))
    return (x - x.mean(0)) / x.std(0)


def placeholder(name: str) -> types.ModuleType:
    """Makes a module in which every public name is a function that returns None."""
    module = types.ModuleType(name)
    module.__path__ = []
    module.__getattr__ = lambda key: None if key.startswith("__") else lambda *_, **__: None
    return module


@contextlib.contextmanager
def imports_of(case: Case, repo: Path) -> Iterator[None]:
    """Lets the published scripts import on a current torch; undoes what they do to Python."""
    replaced = [*UNUSED, "torch._six", "lib.tabular", "lib.datasets"]
    modules = {name: placeholder(name) for name in replaced}
    modules["torch._six"].container_abcs = collections.abc  # left torch in 2021
    rows = batch(case, torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(rows, torch.zeros(len(rows)))
    modules["lib.tabular"].get_tabular_datasets = lambda *_: (data, None, data)
    modules["lib.datasets"].CIFAR10 = lambda *_, **__: data
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    root, argv = logging.getLogger(), sys.argv
    handlers, level = root.handlers[:], root.level
    sys.modules.update(modules)
    sys.path.insert(0, str(repo))
    logging.disable(logging.CRITICAL)  # the scripts log their own source text
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
        sys.path.remove(str(repo))
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        sys.argv, root.handlers = argv, handlers
        root.setLevel(level)
        logging.disable(logging.NOTSET)


def row_norm_max(fx: Tensor, fz: Tensor) -> float:
    """The largest Euclidean distance between rows of two (rows, *shape) tensors."""
    return float((fx - fz).flatten(1).norm(dim=1).max())


class Published:
    """The published model with its own optimizer, loss and Lipschitz update."""

    def __init__(self, case: Case, repo: Path) -> None:
        warnings.filterwarnings("ignore", message="This overload of add", category=UserWarning)
        with imports_of(case, repo), tempfile.TemporaryDirectory() as folder:
            sys.argv = [case.script, *case.arguments.split(), "--save", folder, "--seed", "0"]
            names = runpy.run_path(str(repo / case.script), run_name="__main__")
        self.model, self.optimizer, self.args = names["model"], names["optimizer"], names["args"]
        self.compute_loss, self.update_lipschitz = names["compute_loss"], names["update_lipschitz"]
        self.model.train()
        self.case, self.toys = case, sys.modules.get("lib.toy_data")

    def step(self, x: Tensor) -> float:
        """Takes one training step on x (rows, *shape); returns its loss in nats per row."""
        self.optimizer.zero_grad()
        unit = 1.0
        if self.case.script == "train_toy.py":
            self.toys.inf_train_gen = lambda *_, **__: x.numpy()  # its loss draws the batch itself
            loss, *_ = self.compute_loss(self.args, self.model)
        else:
            loss, *_ = self.compute_loss(x, self.model)
        if len(self.case.shape) == 3:  # bits per dimension
            unit = math.prod(self.case.shape) * math.log(2)
        loss.backward()
        if self.case.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.optimizer.step()
        if self.case.script == "train_toy.py":
            self.update_lipschitz(self.model, self.args.n_lipschitz_iters)
        else:
            self.update_lipschitz(self.model)
        return loss.item() * unit

    @torch.no_grad()
    def residuals(self, x: Tensor) -> list[float]:
        """Per block, the largest |x + g_x(x) - z - g_z(z)| of any row."""
        found = []
        for block in self.parts():
            z = block(x)
            if hasattr(block, "nnet_x"):
                found.append(row_norm_max(x + block.nnet_x(x), z + block.nnet_z(z)))
            x = z
        return found

    def parts(self) -> list[torch.nn.Module]:
        """The published layers, from the data to the latent."""
        model = getattr(self.model, "module", self.model)
        scales = getattr(model, "transforms", [model])
        return [layer for scale in scales for layer in scale.chain]

    def backward_residual(self, x: Tensor) -> float:
        """Takes a step; returns the largest residual / right-hand side of its backward solves."""
        module, ends = sys.modules["lib.layers.implicit_block"], []
        solve = module.broyden

        def watched(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found = solve(*args, **kwargs)
            if kwargs["name"] == "backward":  # it starts at zero, where the residual is the rhs
                ends.append(found["diff"] / found["trace"][0])
            return found

        module.broyden = watched
        try:
            self.step(x)
        finally:
            module.broyden = solve
        return max(ends)
