"""Experts that ``F.grouped_mm`` computes are right, although it leaves the tail undefined."""

import pytest
import torch

from tokenyard import LoraSettings, MoE, Workload, add_lora
from tokenyard.experts import _grouped_matmuls
from tokenyard.tolerance import relative_error

NAN = float("nan")


def grouped_mm(left, right, offs):
    """Compute ``F.grouped_mm``, with NaN in what it leaves undefined."""
    ends = offs.tolist()
    bounds = list(zip([0, *ends[:-1]], ends))
    if left.shape[1] == right.shape[-2] and right.dim() == 3:
        out = torch.full((left.shape[0], right.shape[2]), NAN, dtype=left.dtype)
        for expert, (start, end) in enumerate(bounds):
            out[start:end] = left[start:end] @ right[expert]
        return out
    out = torch.full((len(ends), left.shape[0], right.shape[1]), NAN, dtype=left.dtype)
    for expert, (start, end) in enumerate(bounds):
        if end > start:
            out[expert] = left[:, start:end] @ right[start:end]
    return out


@pytest.mark.parametrize("adapted", [False, True], ids=["experts", "adapters"])
def test_an_undefined_tail_reaches_no_result(monkeypatch, adapted):
    torch.manual_seed(1)
    workload = Workload(12, 10, 5, 2, bias=True, dtype=torch.float64)
    experts = MoE(workload, backends={"experts": "torch"}, dtype=torch.float64).experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if adapted:
        add_lora(experts, LoraSettings(3, 6.0), ["up", "down"])
        for parameter in experts.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        experts.requires_grad_(True)
    x = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(20, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 4, (20, 2), dtype=torch.int32)  # the last expert has no rows
    ids[::3] = 5  # dropped
    dy = torch.randn_like(x)

    def results():
        y = experts.compute(x, ids, weights)
        return [y, *torch.autograd.grad(y, [x, weights, *experts.parameters()], dy)]

    want = results()
    calls = []
    monkeypatch.setattr(_grouped_matmuls, "_grouped_mm_fits", lambda *_: True)
    monkeypatch.setattr(
        _grouped_matmuls.F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k)
    )
    for got, expected in zip(results(), want, strict=True):
        assert relative_error(got, expected) < 1e-12
    assert len(calls) >= 6
