"""Replayed launches compute what the function computes, with the tensors of each call."""

import pytest
import torch
import triton
import triton.language as tl

from tokenyard import Workload
from tokenyard.interfaces import ExpertWeights
from tokenyard.permutations import TorchPermutation
from tokenyard_kernels_triton import experts as backends
from tokenyard_kernels_triton import replay
from tokenyard_kernels_triton.launching import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def add_scaled(x, y, out, scale, count, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(x + i, mask=i < count) + scale * tl.load(y + i, mask=i < count)
    tl.store(out + i, total, mask=i < count)


def add(x, y, out, scale):
    count = out.numel()
    launch(add_scaled, (triton.cdiv(count, 32),))(x, y, out, scale, count, SIZE=32)
    return out


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *tensors):
        self.calls += 1
        return self.function(*tensors)


def chain(x, y):
    """Return x + 5 y, in three launches with an intermediate, and the last half of x + 2 y."""
    first = add(x, y, torch.empty_like(x), 2)
    second = add(first, y, x.new_empty(x.shape), 2)
    return add(second, y, torch.empty_like(x), 1), first[16:], x.new_empty(0, 3)


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(replay, "_entries", type(replay._entries)())


def draw(count=32):
    return torch.randn(count, device=DEVICE)


def test_later_calls_do_not_run_the_function():
    function = Counted(chain)
    for _ in range(5):
        x, y = draw(), draw()
        total, half, empty = replay.replayed("chain", function, (x, y))
        torch.testing.assert_close(total, x + 5 * y)
        torch.testing.assert_close(half, (x + 2 * y)[16:])
        assert empty.shape == (0, 3)
    assert function.calls == 2  # the first, and the one that is recorded


def test_an_input_may_be_a_view():
    function = Counted(lambda x, y: (add(x[8:24], y, torch.empty_like(y), 3),))
    for _ in range(4):
        x, y = draw(48)[4:36], draw(16)
        (total,) = replay.replayed("view", function, (x, y))
        torch.testing.assert_close(total, x[8:24] + 3 * y)
    assert function.calls == 2


def test_addresses_of_another_alignment_are_another_key():
    function = Counted(chain)
    for start in (0, 0, 1, 1, 0, 1):
        x, y = draw(33)[start : start + 32], draw()
        torch.testing.assert_close(replay.replayed("chain", function, (x, y))[0], x + 5 * y)
    assert function.calls == 4


def test_another_dtype_is_another_key():
    function = Counted(chain)
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float32, torch.float64):
        x, y = draw().to(dtype), draw()
        total = replay.replayed("chain", function, (x, y))[0]
        torch.testing.assert_close(total, (x + 5 * y).to(total.dtype))
    assert function.calls == 4


def test_inputs_that_share_memory_are_not_recorded():
    function = Counted(chain)
    for _ in range(3):
        x = draw()
        torch.testing.assert_close(replay.replayed("chain", function, (x, x))[0], 6 * x)
    x, y = draw(), draw()
    torch.testing.assert_close(replay.replayed("chain", function, (x, y))[0], x + 5 * y)
    torch.testing.assert_close(replay.replayed("chain", function, (y, x))[0], y + 5 * x)
    assert function.calls == 4  # three times x twice, and the one that is recorded


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (add(x, y, torch.zeros_like(x), 1),),
        lambda x, y: (add(x, (2 * y), torch.empty_like(x), 1),),
        lambda x, y: (x.clone(),),
    ],
    ids=["zeros", "a product", "a copy"],
)
def test_a_function_with_other_operators_is_never_replayed(other):
    function = Counted(other)
    for _ in range(4):
        x, y = draw(), draw()
        torch.testing.assert_close(replay.replayed("other", function, (x, y)), other(x, y))
    assert function.calls == 4


def test_memory_of_intermediates_is_reused():
    """An intermediate is freed after the last launch that reads it, as the function does."""

    def long(x, y):
        for _ in range(6):
            x = add(x, y, torch.empty_like(x), 1)
        return (x,)

    for _ in range(3):
        x, y = draw(), draw()
        torch.testing.assert_close(replay.replayed("long", long, (x, y))[0], x + 6 * y)
    (entry,) = replay._entries.values()
    freed = [slot for step in entry.program.steps for slot in step.frees]
    assert len(freed) == len(set(freed)) == 5


def test_old_keys_are_forgotten(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    for key in range(5):
        replay.replayed(key, chain, (draw(), draw()))
    assert [key[0] for key in replay._entries] == [2, 3, 4]


GLUON = pytest.param("GluonExperts", marks=pytest.mark.gpu)


def gradients_of_new_inputs(kernel, workload, seed, tokens=37):
    """Return y and all gradients of a layer with random inputs, some slots dropped."""
    torch.manual_seed(seed)
    experts, rows = workload.num_experts, 2 * workload.ffn_dim
    dtype, device = workload.dtype, workload.device

    def leaf(*size):
        return torch.randn(size, dtype=dtype, device=device).requires_grad_()

    x = leaf(tokens, workload.dim)
    topk_weights = torch.rand(tokens, workload.top_k, device=device).requires_grad_()
    ids = torch.randint(0, experts + 1, topk_weights.shape, device=device, dtype=torch.int32)
    biases = (leaf(experts, rows), leaf(experts, workload.dim)) if workload.bias else (None, None)
    weights = ExpertWeights(
        leaf(experts, rows, workload.dim), leaf(experts, workload.dim, workload.ffn_dim), *biases
    )
    plan = TorchPermutation(workload).plan(ids, experts)
    y = kernel(x, plan, topk_weights, weights)
    leaves = [leaf for leaf in (x, topk_weights, *weights) if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("save", ["pre_activation", "fp8", "recompute"])
@pytest.mark.parametrize("name", ["TritonExperts", GLUON])
def test_replayed_experts_give_the_same_bits(monkeypatch, name, save, bias):
    workload = Workload(64, 32, 3, 2, bias=bias, dtype=torch.bfloat16, device=torch.device(DEVICE))
    kernel = getattr(backends, name)(workload, None, save=save)
    results = [gradients_of_new_inputs(kernel, workload, seed) for seed in range(4)]
    programs = [entry.program for entry in replay._entries.values()]
    assert len(programs) == 2  # forward and backward
    assert None not in programs
    monkeypatch.setattr(replay, "can_record", lambda: False)
    for seed, result in enumerate(results):
        for got, want in zip(result, gradients_of_new_inputs(kernel, workload, seed), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "fp8", "weight_gradients": "fp8"}])
@pytest.mark.parametrize("tokens", [37, 700])
def test_replayed_descriptors_give_the_same_bits(monkeypatch, tokens, options):
    """Also if all memory that is free, and so each address, was written and used before."""
    workload = Workload(256, 128, 8, 2, dtype=torch.bfloat16, device=torch.device(DEVICE))
    kernel = backends.GluonExperts(workload, None, **options)
    results = []
    for seed in range(6):
        results.append(gradients_of_new_inputs(kernel, workload, seed, tokens))
        held = [torch.full((1 << size,), float("nan"), device=DEVICE) for size in range(8, 21)]
        del held[:: 1 + seed % 2]
    programs = [entry.program for entry in replay._entries.values()]
    assert any(step.direct.maps for program in programs for step in program.steps)
    monkeypatch.setattr(replay, "can_record", lambda: False)
    for seed, result in enumerate(results):
        expected = gradients_of_new_inputs(kernel, workload, seed, tokens)
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got, want)
