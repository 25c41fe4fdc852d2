"""Products that are symmetric, against float64; in the tests' interpreter of Gluon on a CPU."""

import pytest
import torch

from tokenyard.tolerance import relative_error

from . import gluon_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if DEVICE == "cpu":
        gluon_interpreter.install(monkeypatch)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("size", "depth"), [(72, 200), (320, 64), (456, 136)])
def test_a_product_with_an_addend_and_a_diagonal(transposed, size, depth):
    """Sizes end within tiles and blocks. All of the result is written, above the diagonal too."""
    from tokenyard_kernels_triton.ops._symmetric import symmetric_product

    x = torch.randn(3, depth, size, device=DEVICE).half() / 8
    x = x.mT if transposed else x.mT.contiguous()
    addend = torch.randn(3, size, size, device=DEVICE).half()
    addend += addend.mT.clone()
    out = torch.full_like(addend, torch.nan)
    symmetric_product(x, x, out, 0.5, addend, -2.0, 3.0)
    product = x.double() @ x.double().mT
    eye = torch.eye(size, device=DEVICE, dtype=torch.float64)
    assert relative_error(out, 0.5 * product - 2 * addend.double() + 3 * eye) < 1e-3
    assert torch.equal(out, out.mT)
    symmetric_product(x, x, out)
    assert relative_error(out, product) < 1e-3
