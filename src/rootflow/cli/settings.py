"""``--set key=value``: from words on the command line to options of a flow and of its fit."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

import rootflow
from rootflow.cli.common import WrongUse
from rootflow.training import FitConfig
from rootflow.training.config import FOR_IMAGES
from rootflow.zoo import ZOO, build

__all__ = ["as_words", "assign", "build_flow", "fit_config", "merge_budget", "parse"]

Config = TypeVar("Config", bound=BaseModel)


def parse(
    flow: str,
    assignments: Sequence[str],
    config: type[BaseModel] = FitConfig,
    images: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the flow and of the fit, from words such as ``blocks=4`` or ``fit.lr=1e-3``.

    A bare name is looked up among the options of the flow first, then among the fields of
    ``config``. ``images``: the flow is one of images. Raises WrongUse naming the valid names for an
    unknown flow or key, or the wanted type for a bad value.
    """
    if flow not in ZOO:
        raise WrongUse(f"--flow {flow}: unknown; choose one of {', '.join(ZOO)}")
    try:
        defaults, fields = ZOO[flow].options(images), config.model_fields
    except ValueError as error:
        raise WrongUse(f"--flow {flow}: {error}") from None
    return assign(assignments, fields, defaults, f"options of flow {flow}")


def assign(
    assignments: Sequence[str],
    fields: Mapping[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    own: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``parse`` for options with these ``defaults``, called ``own``, and ``fields`` of the fit."""
    options: dict[str, Any] = {}
    fit: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise WrongUse(f"--set {assignment}: give it as key=value")
        room, _, name = key.strip().rpartition(".")
        if room in ("", "flow") and name in defaults:
            options[name] = _typed(key, _literal(key, text.strip()), defaults[name])
        elif room in ("", "fit") and name in fields:
            fit[name] = _literal(key, text.strip())
        else:
            raise WrongUse(
                f"--set {key}: unknown; "
                + (f"{own} are {', '.join(defaults)}; " if own else "")
                + f"options of the fit are {', '.join(fields)}"
            )
    return options, fit


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """The words ``--set key=value`` that ``assign`` reads as these settings."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for key, value in settings.items()
    }
    return [word for key, text in texts.items() for word in ("--set", f"{key}={text}")]


def fit_config(
    settings: Mapping[str, Any],
    minutes: float | None,
    steps: int | None,
    seed: int | None,
    images: bool = False,
) -> FitConfig:
    """The checked settings of a fit; five minutes unless a budget is given. Raises WrongUse."""
    settings = {**(FOR_IMAGES if images else {}), **settings}
    return merge_budget(FitConfig, settings, minutes, steps, seed, default_minutes=5.0)


def merge_budget(
    config: type[Config], settings: Mapping[str, Any], minutes: float | None, steps: int | None,
    seed: int | None, default_minutes: float,
) -> Config:
    """``settings`` and the options of the same names, checked by ``config``. Raises WrongUse."""
    given = {"minutes": minutes, "steps": steps, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & settings.keys():
        raise WrongUse(f"--{name} and --set {name}=... contradict each other; give one of them")
    merged = {**settings, **given}
    if merged.get("minutes") is None and merged.get("steps") is None:
        merged["minutes"] = default_minutes
    try:
        return config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name, text = ".".join(map(str, first["loc"])), first["msg"]
        raise WrongUse(f"{name}={first['input']!r} cannot be used: {text.lower()}") from None


def build_flow(recipe: Mapping[str, Any], seed: int) -> rootflow.Flow:
    """The untrained flow, its weights drawn from ``seed``. Raises WrongUse for a bad option."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            flow = build(recipe)
        with torch.no_grad():  # some options are looked at only when the flow is used
            flow.eval().log_prob(torch.zeros(2, *flow.event))
    except (TypeError, ValueError) as error:
        raise WrongUse(f"flow {recipe['name']}: {error}") from error
    return flow


def _literal(key: str, text: str) -> Any:
    """A JSON or TOML value, numbers separated by commas, or else the text itself."""
    value: Any = text
    if text.startswith("(") and text.endswith(")"):
        text = f"[{text[1:-1]}]"
    if text.lower() in ("none", "null"):
        return None
    for document in (f"value = {text}", f"value = [{text}]"):
        try:
            value = tomllib.loads(document)["value"]
            break
        except tomllib.TOMLDecodeError:
            continue
    else:
        try:
            value = json.loads(text)
        except ValueError:
            return text
    if isinstance(value, float) and not math.isfinite(value):
        raise WrongUse(f"--set {key}={text}: give a finite number")
    return value


def _typed(key: str, value: Any, default: Any) -> Any:
    """The value if it is of the default's type; an integer passes as a float or as one width."""
    if isinstance(default, tuple):
        widths = tuple(value) if isinstance(value, list) else (value,)
        if widths and all(type(width) is int and width > 0 for width in widths):
            return widths
        wanted = "positive whole numbers such as 64,64"
    elif isinstance(default, float):
        if type(value) in (int, float):
            return float(value)
        wanted = "a number"
    elif isinstance(default, bool | int):
        if type(value) is type(default):
            return value
        wanted = "true or false" if isinstance(default, bool) else "a whole number"
    else:
        if value is None or isinstance(value, str) or (default is None and type(value) is int):
            return value
        wanted = "a word or none" if default is not None else "a word, a whole number or none"
    raise WrongUse(f"--set {key}: {value!r} cannot be used; give {wanted}")
