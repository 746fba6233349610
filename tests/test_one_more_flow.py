"""Adding a flow takes one file and one entry: the guide's example is run and obeys the laws."""

import re
from pathlib import Path

import pytest
import torch

import rootflow
from rootflow.zoo import ZOO

GUIDE = Path(__file__).parents[1] / "docs" / "flows.md"


@pytest.fixture
def stretch(monkeypatch):
    monkeypatch.setattr("rootflow.zoo.ZOO", dict(ZOO))
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    with torch.random.fork_rng():
        exec(code[-1], {})
    flow = rootflow.flow("stretch", 3, blocks=2).double()
    with torch.no_grad():
        for k, p in enumerate(flow.parameters()):
            p.copy_(torch.tensor([0.3, -0.2, 0.1]) * (k + 1))
    return flow


def test_the_guides_flow_obeys_the_laws(stretch, tmp_path):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, log_det = stretch(x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: stretch(v)[0]))(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-12)
    back, log_det_back = stretch.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-12)
    stretch.save(tmp_path / "model")
    assert torch.equal(rootflow.load(tmp_path / "model").log_prob(x), stretch.log_prob(x))
    assert any(entry["name"] == "stretch" for entry in rootflow.flows())
