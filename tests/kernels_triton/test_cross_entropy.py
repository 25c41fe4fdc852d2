"""The loss of training in one kernel; in the interpreter on a CPU."""

import pytest
import torch

from tokenyard.cross_entropy import replace_by_gradient as reference
from tokenyard.tolerance import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(logits, ids, scale):
    from tokenyard_kernels_triton.ops._cross_entropy import replace_by_gradient

    return replace_by_gradient(logits, ids, scale)


def drawn(tokens, vocabulary, dtype):
    logits = (5 * torch.randn(tokens, vocabulary, device=DEVICE)).to(dtype)
    scale = torch.rand(tokens, device=DEVICE)
    scale[::3] = 0
    return logits, torch.randint(0, vocabulary, (tokens,), device=DEVICE), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(7, 53), (1, 1), (4, 4096), (3, 9001), (0, 9)])
def test_loss_and_gradient(tokens, vocabulary, dtype):
    logits, ids, scale = drawn(tokens, vocabulary, dtype)
    exact = logits.double()
    want = reference(exact, ids, scale.double())
    gradient = logits.clone()
    nats = kernel(gradient, ids, scale)
    # Triton's interpreter truncates to 16 bits.
    limit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert relative_error(nats, want) < 1e-6
    assert relative_error(gradient, exact) < limit
    assert not gradient[scale == 0].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_make_the_loss_so(value):
    logits, ids, scale = drawn(4, 100, torch.float32)
    logits[:, 3] = value
    assert kernel(logits, ids, scale).isfinite().tolist() == (scale == 0).tolist()


@pytest.mark.parametrize("unknown", [-1, 100, 10**6])
def test_an_id_outside_the_vocabulary_makes_the_loss_nan(unknown):
    logits = torch.randn(2, 100, device=DEVICE)
    ids = torch.tensor([unknown, 5], device=DEVICE)
    assert kernel(logits, ids, torch.ones(2, device=DEVICE)).isnan().tolist() == [True, False]


def test_impossible_tokens_have_no_gradient():
    logits = torch.full((1, 100), float("-inf"), device=DEVICE)
    logits[0, 7] = 1
    ids = torch.tensor([7], device=DEVICE)
    assert kernel(logits, ids, torch.ones(1, device=DEVICE)).item() == 0
    assert not logits.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_of_a_model_uses_it_on_a_gpu(dtype):
    from tokenyard import Targets, linear_cross_entropy

    x = torch.randn(300, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 1000, (300,), device="cuda")
    results = []
    for a, b in ((x, weight), (x.detach().double(), weight.detach().double())):
        a = a.detach().requires_grad_()
        b = b.detach().requires_grad_()
        loss = linear_cross_entropy(a, b, Targets(ids), chunk=128) / 6000
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    limit = 1e-13 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for got, want in zip(*results):
        assert relative_error(got, want) < limit
