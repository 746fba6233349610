"""What every test shares: how hypothesis draws, one thread, a guard over torch's global state."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(name, None)  # each makes typer print colours into pipes, where tests read text

torch.set_num_threads(1)  # results are bit-equal only for one thread count; xdist fills the cores


def global_state() -> dict[str, object]:
    """Everything in torch that one part of a program can change under another's feet."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "global random state": torch.get_rng_state().numpy().tobytes(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradient mode": torch.is_grad_enabled(),
    }


def restore(state: dict[str, object]) -> None:
    """Put back what can make the next test fail for this one's fault."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_default_device(state["default device"])
    torch.distributions.Distribution.set_default_validate_args(state["validation of distributions"])
    torch.set_num_threads(state["number of threads"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_grad_enabled(state["gradient mode"])


@pytest.fixture(autouse=True)
def unchanged_global_state() -> Iterator[None]:
    """Fail the test that changes torch's global state, by itself or through the library."""
    before = global_state()
    yield
    after = global_state()
    changed = [name for name, value in before.items() if after[name] != value]
    if changed:
        restore(before)
        pytest.fail(
            f"this test changed torch's {', '.join(changed)}: draw from a torch.Generator, pass "
            "dtype= and device=, and wrap modules of torch that draw their own weights in "
            "torch.random.fork_rng()",
            pytrace=False,
        )
