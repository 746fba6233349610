"""Saved flows and unfinished fits: equality, and one clear error for every kind of damage."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import rootflow
from rootflow import CheckpointError, FitConfig, fit
from rootflow.store import _digest, save_directory
from rootflow.training.checkpoint import read_state, write_state

FILES = ["config.json", "model.safetensors", "manifest.json"]


def build(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return rootflow.flow("implicit", 2, blocks=1, hidden=(5,), **options)


@pytest.fixture
def saved(tmp_path):
    build().save(tmp_path / "model")
    return tmp_path / "model"


def seal(directory):
    """A manifest that fits the files, so that the later checks are reached."""
    names = ("config.json", "model.safetensors")
    manifest = {name: _digest((directory / name).read_bytes()) for name in names}
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_loaded_equals_what_was_saved(dtype, tmp_path):
    flow = build(context=1).to(dtype)
    flow.save(tmp_path)
    again = rootflow.load(tmp_path)
    assert not again.training
    state, other = flow.state_dict(), again.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[k], other[k]) and state[k].dtype == other[k].dtype for k in state)
    c = torch.zeros(1, dtype=dtype)
    assert again.sample((2,), c, generator=torch.Generator()).dtype == dtype
    flow.save(tmp_path)  # over itself
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_damage_to_any_file_is_one_clear_error(saved, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        cut = {"flip": len(content), "truncate": len(content) // 2, "empty": 0}[damage]
        path.write_bytes(content[:cut])
    with pytest.raises(CheckpointError) as caught:
        rootflow.load(saved)
    message = str(caught.value)
    assert "\n" not in message
    assert str(saved) in message


def test_every_flipped_byte_of_the_weights_is_noticed(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 40)):
        broken = bytearray(content)
        broken[at] ^= 0x80
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="checksum does not match"):
            rootflow.load(saved)


@pytest.mark.parametrize("change", ["extra", "missing", "shape", "not tensors"])
def test_tensors_that_do_not_fit_the_flow(saved, change):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if change == "extra":
        tensors["more"] = torch.zeros(1)
    elif change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = torch.zeros(7, 7, 7)
    save_file(tensors, path)
    if change == "not tensors":
        path.write_bytes(b"\x80\x04K\x01." * 10)  # a pickle is not even looked at
    seal(saved)
    words = {"extra": "first difference 'more'", "missing": name, "shape": r"has shape \(7, 7, 7\)"}
    with pytest.raises(CheckpointError, match=words.get(change, "model.safetensors")):
        rootflow.load(saved)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("format_version", 99, "newer than this rootflow reads"),
        ("format_version", "1", "not a rootflow|newer"),
        ("flow", None, "flow"),
        ("flow", {"name": "glow2", "features": 2}, "does not describe a known flow"),
        ("flow", {"name": "implicit"}, "does not describe a known flow"),
        ("flow", {"name": "implicit", "features": "two"}, "does not describe a known flow"),
    ],
)
def test_configurations_of_other_programs(saved, entry, value, message):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, entry: value}))
    seal(saved)
    with pytest.raises(CheckpointError, match=message):
        rootflow.load(saved)


def test_there_must_be_a_directory_and_a_recipe(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        rootflow.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        rootflow.load(tmp_path)
    flow = build()
    flow.recipe = None
    with pytest.raises(ValueError, match="put together by hand"):
        flow.save(tmp_path)


def test_other_entries_of_the_configuration_survive(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"source": "a.csv"}}))
    flow = build()
    save_directory(tmp_path, flow.recipe, flow.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["data"] == {"source": "a.csv"}
    rootflow.load(tmp_path)


def test_states_replace_each_other_and_a_damaged_one_is_refused(tmp_path):
    assert read_state(tmp_path) is None
    for step in (1, 2):
        write_state(tmp_path, {"a": torch.full((3,), float(step))}, {"step": step})
    (path,) = tmp_path.iterdir()
    tensors, facts = read_state(tmp_path)
    assert facts == {"step": 2}
    assert torch.equal(tensors["a"], torch.full((3,), 2.0))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-1] + b"?"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged and cannot be resumed"):
            read_state(tmp_path)
    write_state(tmp_path / "other", {"a": torch.zeros(1)}, {"step": 1})
    (older,) = (tmp_path / "other").iterdir()
    (tmp_path / older.name).write_bytes(older.read_bytes())
    assert read_state(tmp_path)[1] == {"step": 1}  # the damaged newer one is passed over


def test_a_damaged_or_foreign_state_stops_the_fit(tmp_path):
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    config = FitConfig(steps=4, batch_size=32)
    fit(build(), x, config=config, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="another flow"):
        fit(build(activation="lipswish"), x, config=config, checkpoint=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged and cannot be resumed"):
        fit(build(), x, config=config, checkpoint=tmp_path)
