"""The loss of the head, in chunks of tokens, equals the cross-entropy of all logits."""

import pytest
import torch
from torch.nn import functional as F

from tokenyard import (
    IGNORED,
    Output,
    Targets,
    TokenLoss,
    cross_entropy,
    linear_cross_entropy,
    predict,
)
from tokenyard.measure.memory import peak_bytes
from tokenyard.tolerance import relative_error

T, D, V = 37, 16, 53


def drawn(dtype=torch.float64, tokens=T):
    """Return x [T, D], a head [V, D] and targets, some ignored and some of weight 0."""
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, V, (tokens,))
    ids[::5] = IGNORED
    weights = torch.rand(tokens) * (torch.arange(tokens) % 7 != 0)
    return x, weight, Targets(ids, weights)


def reference(x, weight, targets):
    """Return the loss, computed from all logits in float64."""
    logits = x.double() @ weight.double().T
    losses = F.cross_entropy(logits, targets.ids, ignore_index=IGNORED, reduction="none")
    return (losses * (1 if targets.weights is None else targets.weights)).sum()


def loss_and_gradients(loss, x, weight):
    return loss, *torch.autograd.grad(loss * 0.37, (x, weight))


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("weighted", [True, False])
def test_chunks_do_not_change_loss_or_gradients(chunk, weighted):
    x, weight, targets = drawn()
    if not weighted:
        targets = Targets(targets.ids)
    want = loss_and_gradients(reference(x, weight, targets), x, weight)
    got = loss_and_gradients(linear_cross_entropy(x, weight, targets, chunk), x, weight)
    for a, b in zip(got, want):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_dtype(dtype):
    """It is at most twice that of logits computed as a whole in this dtype."""
    x, weight, targets = drawn(dtype)
    exact = loss_and_gradients(reference(x, weight, targets), x, weight)
    logits = (x @ weight.T).float()
    losses = F.cross_entropy(logits, targets.ids, ignore_index=IGNORED, reduction="none")
    whole = loss_and_gradients((losses * targets.weights).sum(), x, weight)
    chunked = loss_and_gradients(linear_cross_entropy(x, weight, targets, 8), x, weight)
    for got, other, want in zip(chunked, whole, exact):
        assert got.dtype in (dtype, torch.float64)
        limit = 2 * relative_error(other, want) + torch.finfo(dtype).eps
        assert relative_error(got, want) <= limit


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_weights():
    x, weight, targets = drawn(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, 8)
    narrow = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets, 8)
    assert torch.equal(loss, narrow)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert dx.dtype == dweight.dtype == torch.float32


def test_tokens_that_are_not_counted_have_no_gradient():
    x, weight, targets = drawn()
    dx, _ = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    counted = (targets.ids != IGNORED) & (targets.weights != 0)
    assert not dx[~counted].any()
    assert dx[counted].any(1).all()


def test_tokens_of_weight_0_have_no_loss_whatever_their_logits():
    logits = torch.randn(3, 7)
    logits[0, 2] = float("inf")
    nats = cross_entropy.replace_by_gradient(
        logits, torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0.5])
    )
    assert nats[0] == 0
    assert not logits[0].any()
    assert logits.isfinite().all()


def test_a_package_may_have_a_kernel_for_a_device():
    """It is called in eager mode, too."""
    calls = []

    def kernel(logits, ids, scale):
        calls.append(len(logits))
        return cross_entropy.replace_by_gradient(logits, ids, scale)

    x, weight, targets = drawn()
    with torch.library._scoped_library("tokenyard", "IMPL") as library:
        library.impl("replace_by_gradient", kernel, "CPU")
        linear_cross_entropy(x, weight, targets).backward()
    assert sum(calls) == len(x.flatten(0, -2))


def test_only_needed_gradients_are_computed():
    x, weight, targets = drawn()
    want = torch.autograd.grad(reference(x, weight, targets), x)
    frozen = weight.detach()
    got = torch.autograd.grad(linear_cross_entropy(x, frozen, targets), x)
    assert relative_error(got[0], want[0]) < 1e-13


def test_evaluation_computes_no_gradients():
    x, weight, targets = drawn()
    stages = (lambda _: linear_cross_entropy(x, weight, targets, chunk=4),)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad
        assert peak_bytes(stages, x.device) < weight.nbytes


def test_tied_heads_add_both_gradients():
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    inputs = torch.randint(0, V, (T,))
    targets = Targets(torch.randint(0, V, (T,)))
    gradients = [
        torch.autograd.grad(loss(F.embedding(inputs, weight), weight, targets), weight)[0]
        for loss in (linear_cross_entropy, reference)
    ]
    assert relative_error(*gradients) < 1e-13


def test_no_tokens_have_no_loss():
    x, weight, targets = drawn(tokens=0)
    loss, dx, dweight = loss_and_gradients(linear_cross_entropy(x, weight, targets), x, weight)
    assert loss == 0
    assert dx.shape == (0, D)
    assert not dweight.any()


def test_a_loss_that_is_not_finite_stays_so():
    x, weight, targets = drawn()
    with torch.no_grad():
        x[1] = float("nan")
    assert linear_cross_entropy(x, weight, Targets(targets.ids)).isnan()


def test_logits_never_exist_as_a_whole():
    x = torch.randn(2048, D, requires_grad=True)
    weight = torch.randn(512, D, requires_grad=True)
    targets = Targets(torch.randint(0, 512, (2048,)))

    def stages(chunk):
        forward = lambda _: linear_cross_entropy(x, weight, targets, chunk)  # noqa: E731
        return (forward, lambda loss: loss.backward())

    whole = peak_bytes(stages(2048), x.device)
    chunked = peak_bytes(stages(64), x.device)
    assert whole > 2 * 2048 * 512 * 4
    assert chunked < whole / 8


def test_peak_memory_is_estimated_within_a_tenth(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 2**20)
    tokens, dim, vocabulary = 4096, 64, 4096
    x = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(vocabulary, dim, requires_grad=True)
    targets = Targets(torch.randint(0, vocabulary, (tokens,)))
    peak = peak_bytes((lambda _: linear_cross_entropy(x, weight, targets),), x.device)
    estimate = cross_entropy.loss_bytes(tokens, vocabulary, dim, width=4)
    assert peak == pytest.approx(estimate, rel=0.1)


def test_predict_returns_logits_or_a_loss():
    x, weight, _ = drawn()
    output = predict(x, weight, ())
    assert isinstance(output, Output)
    assert torch.equal(output.logits, x @ weight.T)
    targets = Targets(torch.randint(0, V, (T,)))
    loss = predict(x, weight, (), targets)
    assert isinstance(loss, TokenLoss)
    assert torch.equal(loss.nats, linear_cross_entropy(x, weight, targets))
