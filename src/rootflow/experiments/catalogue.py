"""Experiments as files: one TOML each, checked strictly before anything runs.

A file holds what the experiment is, which kind of work it needs, and its settings: those that all
scales share under ``[common]``, those of one scale under ``[smoke]``, ``[small]`` or ``[paper]``.
Settings become numbers, words and lists only; a file can name nothing that is code.
"""

from __future__ import annotations

import json
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from ..errors import DataError
from .classify import Classify
from .images import Images
from .parts import Settings, Strict, among
from .planar import PlanarInference
from .slopes import Slopes
from .tables import Tables
from .theory import Theory
from .toys import Toys
from .vae import Vae
from .zoo import Zoo

__all__ = ["KINDS", "SCALES", "Recipe", "Scale", "folder", "names", "recipe", "recipes"]

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
KINDS: dict[str, type[Settings]] = {
    "zoo": Zoo, "toys": Toys, "tables": Tables, "slopes": Slopes, "inference": PlanarInference,
    "vae": Vae, "classify": Classify, "theory": Theory, "images": Images,
}  # fmt: skip


class Recipe(Strict):
    """One experiment.

    ``published`` maps a row, its labels joined by a slash, to a number; ``notes`` say what a scale
    does otherwise than the paper.
    """

    name: str
    kind: str
    summary: str
    source: str
    published: dict[str, float] = Field(default_factory=dict)
    notes: dict[Scale, str] = Field(default_factory=dict)
    common: dict[str, Any] = Field(default_factory=dict)
    smoke: dict[str, Any]
    small: dict[str, Any]
    paper: dict[str, Any]

    @field_validator("kind")
    @classmethod
    def _kind_exists(cls, kind: str) -> str:
        among([kind], KINDS)
        return kind

    @cached_property
    def settings(self) -> dict[Scale, Settings]:
        """The checked settings of each scale. Raises ValidationError, its first word the scale."""
        kind = KINDS[self.kind]
        found: dict[Scale, Settings] = {}
        for scale in SCALES:
            text = json.dumps({**self.common, **getattr(self, scale)})
            try:
                found[scale] = kind.model_validate_json(text, strict=True)
            except ValidationError as error:
                raise DataError(f"{scale}: {_first(error)}") from None
        return found


def folder() -> Path:
    """Where the files lie: inside an installed package, or beside ``src`` in a checkout."""
    here = Path(__file__).resolve()
    installed = here.parent / "toml"
    return installed if installed.is_dir() else here.parents[3] / "experiments"


def names() -> list[str]:
    """The experiments that there are, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def recipes() -> list[Recipe]:
    """Every experiment, by name. Raises DataError for a file that is not one."""
    return [_read(folder() / f"{name}.toml") for name in names()]


def recipe(name: str) -> Recipe:
    """The experiment of that name. Raises ValueError naming those that exist, DataError."""
    if name not in names():
        raise ValueError(f"experiment {name!r} is unknown; choose one of {', '.join(names())}")
    return _read(folder() / f"{name}.toml")


def _read(path: Path) -> Recipe:
    try:
        # JSON text, because only there does strict mode still take a list for a tuple
        found = Recipe.model_validate_json(json.dumps(tomllib.loads(path.read_text("utf-8"))))
        found.settings  # noqa: B018  (checked now, for every scale)
    except ValidationError as error:
        raise DataError(f"{path.name}, {_first(error)}") from None
    except DataError as error:
        raise DataError(f"{path.name}, {error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f"{path.name}: not a TOML file of plain values: {error}") from None
    if found.name != path.stem:
        raise DataError(f"{path.name}: name is {found.name!r}; the file must be named after it")
    return found


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "settings"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}"
