"""Flows handed to others: a directory with a model card, and model repositories on a hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, RootflowError
from .flow import Flow
from .store import FORMAT_VERSION, read_config, write_atomically, write_json
from .zoo import ZOO, load

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

FILES = ("config.json", "model.safetensors", "manifest.json")


def save_pretrained(
    source: Flow | str | Path,
    directory: str | Path,
    *,
    title: str | None = None,
    summary: str = "",
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write a flow with a model card, README.md, into ``directory``, for ``from_pretrained``.

    ``source``: a flow of the registry, or the run directory of a fit, from which the description of
    its columns and, unless ``results`` are given, the figures of result.json are taken, but neither
    its command nor the path of its data. ``results``: names and figures for the card. ``title``,
    ``summary``: its heading and first words; ``license``, ``tags``: for its YAML header.

    Raises ValueError for a flow put together by hand, CheckpointError for a bad run directory.
    """
    directory = Path(directory)
    config: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if isinstance(source, Flow):
        flow = source
    else:
        flow, run = load(source), Path(source)
        config = {k: v for k, v in read_config(run).items() if k != "command"}
        if isinstance(data := config.get("data"), dict):
            config["data"] = {**data, "source": data.get("name")}
        if results is None and (run / "result.json").exists():
            results = json.loads((run / "result.json").read_bytes())
    if flow.recipe is None:
        raise ValueError("source: this flow was put together by hand; only flows made by "
                         "rootflow.flow can be shared")  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    flow.save(directory)
    card = _card(flow, config, title or directory.name, summary, results or {}, license, tags)
    write_atomically(directory / "README.md", card.encode())


def push_to_hub(
    source: Flow | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a flow by rootflow",
    token: str | bool | None = None,
    **card: Any,
) -> str:
    """Upload what ``save_pretrained`` writes to the model repository ``repo_id``; returns its URL.

    The repository is made if there is none. ``card``: further arguments of ``save_pretrained``.
    Raises RootflowError if the hub refuses, ModuleNotFoundError without huggingface_hub.
    """
    api = _hub().HfApi()
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(source, directory, **{"title": repo_id, **card})
        try:
            api.create_repo(repo_id, private=private, exist_ok=True, token=token)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=directory, revision=revision,
                commit_message=commit_message, token=token,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise RootflowError(f"{repo_id}: cannot be pushed: {_line(error)}") from error
    return str(commit.commit_url)


def from_pretrained(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    device: str | torch.device | None = None,
) -> Flow:
    """Read a flow from a directory, or from the model repository of that name, as ``load`` does.

    Of a repository config.json, model.safetensors and manifest.json are fetched, nothing else.
    Raises CheckpointError for what cannot be fetched or is damaged, foreign or newer, and
    ModuleNotFoundError for a repository without huggingface_hub.
    """
    directory = Path(path_or_id)
    if not directory.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
            raise CheckpointError(f"{path_or_id}: no such directory, and no owner/name of a hub")
        try:
            fetched = _hub().snapshot_download(
                str(path_or_id), revision=revision, cache_dir=cache_dir, token=token,
                local_files_only=local_files_only, allow_patterns=list(FILES),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path_or_id}: no such directory, and no repository that can be fetched: "
                f"{_line(error)}"
            ) from error
        directory = Path(fetched)
    return load(directory, device)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a model repository needs huggingface_hub; install it with: pip install 'rootflow[hub]'"
        ) from None
    return huggingface_hub


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _table(rows: Mapping[str, Any]) -> str:
    """Two columns of Markdown; figures with six digits."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
        lines.append(f"| {name} | {shown.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _remark(config: Mapping[str, Any]) -> str:
    """What the ``x`` of the flow are, where they are not the data themselves."""
    from .data import Schema

    data = config.get("data") or {}
    if "inference" in config:
        return (
            "The flow lives on the unconstrained parameters of a posterior, which "
            "`rootflow.inference.load(directory)` reads from these files."
        )
    if "levels" in data:
        return f"It takes images as (pixel + u) / {data['levels']}, with u uniform on [0, 1)."
    if "schema" in data and not Schema.from_json(data["schema"]).plain:
        return (
            "Some columns are mapped before the flow sees them, so its `x` are not the columns of "
            "the table. With these files in a directory, `rootflow score DIRECTORY new.csv` and "
            "`rootflow sample DIRECTORY -n 1000 --out drawn.csv` are about the columns themselves."
        )
    return ""


def _card(
    flow: Flow, config: Mapping[str, Any], title: str, summary: str, results: Mapping[str, Any],
    license: str | None, tags: Sequence[str],
) -> str:  # fmt: skip
    recipe: dict[str, Any] = flow.recipe or {}
    name, given = recipe["name"], flow.context
    columns: Sequence[str] = (config.get("data") or {}).get("columns", [])
    entry = ZOO.get(name)
    header = {
        "library_name": "rootflow",
        **({"license": license} if license else {}),
        "tags": ["normalizing-flow", "density-estimation", name, *tags],
    }
    figures = {k: v for k, v in results.items() if isinstance(v, (int, float, str))}
    about = {
        "flow": f"{name}: {entry.summary} ({entry.source})" if entry else name,
        "one sample": "x".join(map(str, flow.event)) + (f", given {given} numbers" * bool(given)),
        **({"columns": ", ".join(columns)} if columns else {}),
        "parameters": sum(p.numel() for p in flow.parameters()),
        **recipe.get("options", {}),
    }
    use = ["import rootflow", "", f"flow = rootflow.from_pretrained({title!r})"]
    call = ("x, context=c", "(1000,), context=c") if given else ("x", "(1000,)")
    use += [
        f"flow.log_prob({call[0]})  # nats per row, in the units of x",
        f"flow.sample({call[1]})",
    ]
    parts = [
        # JSON is YAML, and quotes whatever a title or tag may hold.
        "---\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in header.items()) + "\n---",
        f"# {title}",
        summary or "A normalizing flow: densities and samples by one invertible map.",
        "```python\n" + "\n".join(use) + "\n```",
        _remark(config), "## The flow", _table(about),
    ]  # fmt: skip
    if figures:
        parts += ["## Figures of the fit", _table(figures),
                  "Log-densities are natural logarithms, in the units of the data."]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"
