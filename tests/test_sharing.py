"""Flows on disk and on a hub: older formats, damage of every kind, model cards, a stand-in hub."""

import json
import resource
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rootflow
from rootflow import CheckpointError, RootflowError, store
from rootflow.data import Schema
from rootflow.transforms import Scale
from rootflow.zoo import ZOO

FORMATS = Path(__file__).parent / "formats"
X = torch.tensor([[0.0, 0.0], [1.0, -2.0], [30.0, 4.0]], dtype=torch.float64)
C = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
LOG_PROB = [-21.15547589738019, -10.395033812287421, -4800.670773216627]  # when it was written
WHOLE = {path.name: path.read_bytes() for path in (FORMATS / "1").iterdir()}
LOGGED = Schema.of("ac", ["float64"] * 2).to_json()
LOGGED["columns"][0]["map"]["lower"] = 0.0
HEADER = struct.unpack("<Q", WHOLE["model.safetensors"][:8])[0]


def put(directory, weights=None, config=None):
    """A directory of these two files, with a manifest that fits them."""
    raw = WHOLE["config.json"] if config is None else json.dumps(config).encode()
    files = {
        "config.json": raw,
        "model.safetensors": WHOLE["model.safetensors"] if weights is None else weights,
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    manifest = {name: store._digest(content) for name, content in files.items()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def outcome(directory):
    """None for a CheckpointError, otherwise the flow, which then holds what the file says."""
    try:
        flow = rootflow.load(directory)
    except CheckpointError as error:
        message = str(error)
    else:
        state, saved = flow.state_dict(), load_file(directory / "model.safetensors")
        assert set(state) == set(saved)
        assert all(torch.equal(state[k], saved[k]) for k in saved)
        assert all(torch.isfinite(t).all() for t in saved.values())
        return flow
    assert "\n" not in message
    assert str(directory) in message
    return None


def load(weights=None, config=None):
    with tempfile.TemporaryDirectory() as directory:
        return outcome(put(Path(directory), weights, config))


@pytest.mark.parametrize("path", sorted(FORMATS.iterdir()), ids=lambda path: f"format {path.name}")
def test_every_format_ever_written_still_loads(path):
    flow = rootflow.load(path)
    with torch.no_grad():
        found = flow.log_prob(X, C)
    torch.testing.assert_close(
        found, torch.tensor(LOG_PROB, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_an_older_format_is_migrated_step_by_step(tmp_path, monkeypatch):
    config = json.loads(WHOLE["config.json"])
    config["flow"]["options"]["width"] = config["flow"]["options"].pop("hidden")
    tensors = {f"old.{k}": t for k, t in load_file(FORMATS / "1" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    put(tmp_path, (tmp_path / "model.safetensors").read_bytes(), config)
    with pytest.raises(CheckpointError, match="no option 'width'"):
        rootflow.load(tmp_path)

    def renamed_option(config, tensors):
        config["flow"]["options"]["hidden"] = config["flow"]["options"].pop("width")

    def renamed_tensors(config, tensors):
        for name in list(tensors):
            tensors[name.removeprefix("old.")] = tensors.pop(name)

    monkeypatch.setattr(store, "FORMAT_VERSION", 3)
    monkeypatch.setattr(store, "MIGRATIONS", {1: renamed_option, 2: renamed_tensors})
    flow = rootflow.load(tmp_path)
    expected = torch.tensor(LOG_PROB, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(X, C), expected, rtol=1e-9, atol=0)
    flow.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["format_version"] == 3


def test_all_formats_but_the_newest_can_be_migrated():
    assert sorted(store.MIGRATIONS) == list(range(1, store.FORMAT_VERSION))
    assert str(store.FORMAT_VERSION) in {path.name for path in FORMATS.iterdir()}


damage = st.one_of(
    st.integers(0, len(WHOLE["model.safetensors"]) - 1).map(lambda n: lambda b: b[:n]),
    st.tuples(st.integers(0, HEADER + 40), st.integers(1, 255)).map(
        lambda at: lambda b: b[: at[0]] + bytes([b[at[0]] ^ at[1]]) + b[at[0] + 1 :]
    ),
    st.sampled_from([0, 1, 2**31, 2**62, 2**63, 2**64 - 1, HEADER + 1, HEADER - 1]).map(
        lambda n: lambda b: struct.pack("<Q", n) + b[8:]
    ),
    st.binary(max_size=64).map(lambda tail: lambda b: b + tail),
    st.binary(max_size=200).map(lambda content: lambda b: content),
    st.tuples(st.integers(HEADER + 8, len(WHOLE["model.safetensors"]) - 8)).map(
        lambda at: lambda b: b[: at[0]] + b"\xff" * 8 + b[at[0] + 8 :]  # NaN, if a number starts
    ),
)


@settings(max_examples=50)
@given(damage)
def test_damaged_weights_end_in_an_error_or_in_what_they_say(change):
    load(weights=change(WHOLE["model.safetensors"]))


entries = json.loads(WHOLE["model.safetensors"][8 : 8 + HEADER])
numbers = st.sampled_from([0, 1, 8, 16, 24, 2**31, 2**62, 2**63, 2**64, -1, 1.5])
values = st.one_of(
    st.tuples(st.just("data_offsets"), st.lists(numbers, max_size=3)),
    st.tuples(st.just("shape"), st.lists(numbers, max_size=3)),
    st.tuples(st.just("dtype"), st.sampled_from(["F16", "F32", "I64", "BOOL", "F8_E4M3", "X", 1])),
    st.tuples(st.just("more"), st.none()),
)


@settings(max_examples=50)
@given(st.sampled_from(sorted(entries)), values, st.booleans())
def test_wrong_headers_end_in_an_error_or_in_what_they_say(name, change, twice):
    header = json.dumps({**entries, name: {**entries[name], change[0]: change[1]}})
    if twice:  # the same name a second time, as it was
        header = header[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}}}"
    body = WHOLE["model.safetensors"][8 + HEADER :]
    load(weights=struct.pack("<Q", len(header)) + header.encode() + body)


sizes = st.sampled_from([0, 1, 2, 3, 10**3, 10**4, 10**5, 10**9, 2**63, 10**30, -1, 2.0, True])
anything = st.recursive(
    st.none() | st.booleans() | st.text(max_size=4) | sizes | st.floats(0, 2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
ENTRIES = ["name", "features", "shape", "context", "options", "more"]
OPTIONS = [
    "blocks", "hidden", "activation", "lipschitz", "linear", "base", "tails", "terms", "actnorm",
]  # fmt: skip


@settings(max_examples=60)
@given(
    st.sampled_from(ENTRIES + OPTIONS),
    st.one_of(anything, st.sampled_from(sorted(ZOO)), st.lists(sizes, max_size=4)),
    st.sampled_from(["monotone", "nsf-ar", "planar", "glow"]),
)
def test_foreign_configurations_end_in_an_error_or_in_what_they_say(key, value, name):
    config = json.loads(WHOLE["config.json"])
    if name != "monotone":
        config["flow"] = {"name": name, "features": 2, "context": 1, "options": {}}
    (config["flow"] if key in ENTRIES else config["flow"]["options"])[key] = value
    flow = load(config=config)
    if flow is not None:
        assert key != "more"
        assert np.isfinite(flow.log_prob(X, C).detach().numpy()).all()


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": [6000, 6000]},
        {"hidden": [3000] * 90},
        {"blocks": 10**9},
        {"hidden": [1] * 10**4},
        {"features": 8000},
        {"context": 10**4, "hidden": [10**4]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["monotone", "nsf-ar", "nsf-coupling", "sylvester"])
def test_sizes_beyond_the_file_are_refused_before_memory_is_asked_for(name, options):
    flow = {"name": name, "features": 2, "context": 0, "options": dict(options)}
    for key in ("features", "context"):
        flow[key] = flow["options"].pop(key, flow[key])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load(config={"format_version": 1, "flow": flow}) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "damaged or foreign"),
        (b'{"format_version": 1, "format_version": 1}', "a key occurs twice"),
        (b'{"format_version": NaN}', "NaN is no number"),
        (b"[1]", "holds no JSON object"),
        (b'{"format_version": true}', "not a rootflow configuration"),
        (b'{"format_version": 0}', "not a rootflow configuration"),
        (b'{"format_version": 2}', "newer than this rootflow reads"),
        (b'{"format_version": 1}', "'flow' is missing"),
        (b" " * (2**24 + 1), "at most 16777216 are read"),
    ],
    ids=["deep", "twice", "nan", "list", "true", "zero", "future", "no flow", "long"],
)
def test_configurations_that_are_none(tmp_path, content, message):
    put(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["config.json"] = store._digest(content)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        rootflow.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(torch.nan), "holds NaN or infinity"),
        (lambda t: t.float(), "has dtype torch.float32, the flow needs torch.float64"),
        (lambda t: t.long(), "has dtype torch.int64"),
    ],
)
def test_weights_of_another_kind(tmp_path, change, message):
    tensors = load_file(FORMATS / "1" / "model.safetensors")
    last = [name for name, t in tensors.items() if t.is_floating_point()][-1]
    save_file({**tensors, last: change(tensors[last].clone())}, tmp_path / "w")
    put(tmp_path, (tmp_path / "w").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        rootflow.load(tmp_path)


@pytest.fixture
def run(tmp_path):
    """What a fit of a table leaves, as far as it matters here."""
    run = tmp_path / "run"
    run.mkdir()
    data = {"source": "/home/me/secret/moons.csv", "name": "moons.csv", "columns": ["a|b", "c"],
            "dtypes": ["float64"] * 2, "dequantised": {}}  # fmt: skip
    about = {"format_version": 1, "command": "rootflow fit /home/me/secret/moons.csv", "data": data}
    (run / "config.json").write_text(json.dumps(about))
    with torch.random.fork_rng():
        rootflow.flow("maf", 2, blocks=1, hidden=(4,)).save(run)
    (run / "result.json").write_text(json.dumps({"test_log_prob": -2.123456789, "columns": ["a"]}))
    return run


def test_a_shared_run_has_a_card_and_keeps_private_paths_to_itself(run, tmp_path):
    out = tmp_path / "out"
    rootflow.save_pretrained(
        run, out, title="Two: moons", license="mit", tags=["x: y"], summary="From a simulator."
    )
    assert {path.name for path in out.iterdir()} == {*WHOLE, "README.md"}
    card = (out / "README.md").read_text()
    parameters = sum(p.numel() for p in rootflow.load(run).parameters())
    _, header, body = card.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    assert {k: json.loads(v) for k, v in fields.items()} == {
        "library_name": "rootflow",
        "license": "mit",
        "tags": ["normalizing-flow", "density-estimation", "maf", "x: y"],
    }
    for words in ("# Two: moons", "From a simulator.", "| test_log_prob | -2.12346 |",
                  r"| columns | a\|b, c |", f"| parameters | {parameters} |",
                  "Papamakarios"):  # fmt: skip
        assert words in body
    assert "secret" not in "".join(path.read_text("latin-1") for path in out.iterdir())
    again, before = rootflow.from_pretrained(out), rootflow.load(run)
    assert torch.equal(again.log_prob(X.float()), before.log_prob(X.float()))
    assert json.loads((out / "config.json").read_text())["data"]["columns"] == ["a|b", "c"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"data": {"schema": Schema.of("ac", ["float64"] * 2).to_json()}}, None),
        ({"data": {"schema": LOGGED}}, "Some columns are mapped before the flow sees them"),
        ({"data": {"levels": 256}}, "(pixel + u) / 256"),
        ({"inference": {}}, "unconstrained parameters of a posterior"),
    ],
)
def test_a_card_says_what_the_flow_is_about(run, tmp_path, entry, words):
    (run / "config.json").write_text(json.dumps({"format_version": 1, **entry}))
    rootflow.load(FORMATS / "1").save(run)
    rootflow.save_pretrained(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert words is None or words in card
    assert ("before the flow sees them" in card) == (words is not None and "mapped" in words)


def test_a_flow_alone_is_shared_with_the_figures_given(tmp_path):
    flow = rootflow.load(FORMATS / "1")
    rootflow.save_pretrained(flow, tmp_path, results={"validation_log_prob": -1.5, "steps": 10})
    card = (tmp_path / "README.md").read_text()
    assert "| validation_log_prob | -1.5 |" in card
    assert "given 1 numbers" in card
    assert "context=c" in card
    rootflow.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="put together by hand"):
        rootflow.save_pretrained(rootflow.Flow(Scale(2)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub that keeps repositories in a folder and notes the calls."""
    calls, root = [], tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            if repo_id == "me/forbidden":
                raise OSError("403: you may not\nwrite here")
            (root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, options))
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub:{repo_id}")

    def snapshot_download(repo_id, *, allow_patterns, **options):
        calls.append(("download", repo_id, options))
        if not (root / repo_id).is_dir():
            raise FileNotFoundError("404: no such\nrepository")
        copy = tmp_path / "cache"
        shutil.copytree(root / repo_id, copy, dirs_exist_ok=True)
        for path in copy.iterdir():
            if path.name not in allow_patterns:
                path.unlink()
        return str(copy)

    module = ModuleType("huggingface_hub")
    module.HfApi, module.snapshot_download = Api, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_up_to_a_hub_and_down_again(hub, run, tmp_path):
    url = rootflow.push_to_hub(run, "me/moons", private=True, revision="v1", license="mit")
    assert url == "hub:me/moons"
    assert "from_pretrained('me/moons')" in (tmp_path / "hub/me/moons/README.md").read_text()
    flow = rootflow.from_pretrained("me/moons", revision="v1", local_files_only=True)
    assert torch.equal(flow.log_prob(X.float()), rootflow.load(run).log_prob(X.float()))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(WHOLE)
    assert [name for name, *_ in hub] == ["create", "upload", "download"]
    assert hub[0][2] == {"private": True, "exist_ok": True, "token": None}
    assert hub[1][2]["revision"] == hub[2][2]["revision"] == "v1"
    assert hub[2][2]["local_files_only"] is True


def test_a_hub_that_refuses_is_one_clear_line(hub, run):
    with pytest.raises(
        RootflowError, match="me/forbidden: cannot be pushed: 403: you may not write"
    ):
        rootflow.push_to_hub(run, "me/forbidden")
    with pytest.raises(
        CheckpointError, match=r"me/none: no such directory, and no repository .* 404"
    ):
        rootflow.from_pretrained("me/none")
    for path in ("./none", "/tmp/none/of/it", "none", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such directory"):
            rootflow.from_pretrained(path)


def test_the_hub_client_is_optional(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (rootflow.from_pretrained, lambda name: rootflow.push_to_hub(run, name)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'rootflow\[hub\]'"):
            call("me/moons")
