"""The elementwise kernels of Muon against float64; in the interpreter on a CPU."""

import math
import subprocess
import sys

import pytest
import torch

from tokenyard.tolerance import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDED = 2 * torch.finfo(torch.bfloat16).eps  # Triton's interpreter truncates to bfloat16
SIZE = (3, 1000)  # ends within a program's block


def scalar(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize(
    ("gradient", "momentum", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, ROUNDED),
    ],
)
def test_the_momentum_and_nesterovs_update(gradient, momentum, tolerance):
    from tokenyard_kernels_triton.optimizer.muon import nesterov

    g = torch.randn(SIZE, device=DEVICE).to(gradient)
    m = torch.randn(SIZE, device=DEVICE).to(momentum)
    want = 0.95 * m.double() + 0.05 * 0.5 * g.double()
    version = m._version
    update = nesterov(g, m, scalar(0.5), 0.95)
    assert relative_error(m, want) < tolerance
    assert update.dtype == torch.bfloat16
    assert relative_error(update, 0.05 * 0.5 * g.double() + 0.95 * want) < ROUNDED
    assert m._version > version


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_leaves_the_momentum(scale):
    from tokenyard_kernels_triton.optimizer.muon import nesterov

    m = torch.randn(SIZE, device=DEVICE)
    before = m.clone()
    update = nesterov(torch.full_like(m, math.nan), m, scalar(scale), 0.95)
    assert torch.equal(m, before)
    assert update.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_master_and_weight_descend(dtype):
    from tokenyard_kernels_triton.optimizer.muon import descend

    master = torch.randn(SIZE, device=DEVICE)
    weight = master if dtype == torch.float32 else torch.zeros_like(master, dtype=dtype)
    direction = torch.randn(SIZE, device=DEVICE).bfloat16()
    want = 0.9 * master.double() - 0.1 * direction.double()
    version = weight._version
    descend(master, weight, direction, scalar(0.1), scalar(0.9))
    assert relative_error(master, want) < 1e-6
    assert relative_error(weight, want) < (1e-6 if weight is master else ROUNDED)
    assert weight._version > version


@pytest.mark.parametrize("factors", [False, True])
def test_matrices_are_scaled_into_another_dtype(factors):
    """Both stacks may have gaps between matrices."""
    from tokenyard_kernels_triton.optimizer.muon import scale_matrices

    source = torch.randn(3, 90, 40, device=DEVICE)[:, :60]
    out = torch.zeros(3, 70, 40, device=DEVICE).half()
    each = torch.rand(3, device=DEVICE) if factors else None
    scale_matrices(source, out[:, :60], 2.5, each)
    want = 2.5 * source.double()
    if each is not None:
        want *= each.double()[:, None, None]
    assert relative_error(out[:, :60], want) < 1e-3
    assert not out[:, 60:].any()


def test_symmetric_products_alone_need_gluon(monkeypatch):
    from tokenyard_kernels_triton.optimizer import muon

    x = torch.empty(2, 16, 24).half()
    assert not muon.multiplies(x)
    monkeypatch.setattr(muon, "runs_gluon", lambda device: True)
    assert muon.multiplies(x)
    assert not muon.multiplies(x.float())
    assert not muon.multiplies(x[:, :12])
    imports = "import sys, tokenyard_kernels_triton.optimizer.muon"
    code = f"{imports}; assert 'tokenyard_kernels_triton.ops._symmetric' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
