"""What the experts keep for the backward pass, and its cost; in the interpreter on a CPU."""

import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tokenyard import ConfigError, Workload
from tokenyard.interfaces import ExpertWeights
from tokenyard.tolerance import relative_error

T, D, F, E, K = 16, 32, 64, 4, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKLOAD = Workload(D, F, E, K, dtype=torch.bfloat16, device=DEVICE)


def experts(save: str):
    from tokenyard_kernels_triton.experts import TritonExperts
    from tokenyard_kernels_triton.permutation import TritonPermutation

    permutation = TritonPermutation(WORKLOAD)
    return permutation, TritonExperts(WORKLOAD, permutation, save=save)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    sizes = {"x": (T, D), "up": (E, 2 * F, D), "down": (E, D, F)}
    leaves = {
        n: torch.randn(s, device=DEVICE).mul(s[-1] ** -0.5).bfloat16().requires_grad_()
        for n, s in sizes.items()
    }
    return leaves | {"weights": torch.rand(T, K, device=DEVICE).requires_grad_()}


def forward(save: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the output, the inputs, and what is kept besides x, the weights and the plan."""
    permutation, kernel = experts(save)
    inputs = tensors()
    plan = permutation.plan(torch.arange(T * K, device=DEVICE, dtype=torch.int32).view(T, K) % E, E)
    known = {t.data_ptr() for t in (*inputs.values(), *plan[:3])}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = kernel(
            inputs["x"], plan, inputs["weights"], ExpertWeights(inputs["up"], inputs["down"])
        )
    return y, inputs, list(kept.values())


@functools.cache  # a run takes seconds in the interpreter
def run(save: str) -> tuple[dict[str, torch.Tensor], int]:
    """Return output and gradients, and the bytes that are kept."""
    y, inputs, kept = forward(save)
    gradients = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return {"y": y.detach(), **dict(zip(inputs, gradients))}, sum(t.nbytes for t in kept)


def test_pre_activation_alone_is_kept_by_default():
    """4KF bytes a token in bfloat16, beside x's 2D."""
    assert run("pre_activation")[1] == 4 * K * F * T


def test_fp8_keeps_about_half():
    kept = run("fp8")[1]
    assert kept <= 0.52 * 4 * K * F * T
    assert kept == 2 * K * F * T + 4 * K * T * (2 * F // 128)  # bytes and a scale for 128 of them


def test_recompute_keeps_nothing():
    assert run("recompute")[1] == 0


def test_the_last_backward_pass_writes_a_gradient_in_the_place_of_the_pre_activation():
    """It takes no memory of its own then. A pass that retains the graph leaves z as it is."""
    y, inputs, (z, _) = forward("pre_activation")
    x = inputs["x"]
    before = z.clone()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(z, before)
    version = z._version
    (again,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(again, dx)
    assert not torch.equal(z, before)
    assert z._version > version  # another node that saved z refuses to run


@pytest.mark.parametrize("save", ["pre_activation", "fp8", "recompute"])
def test_the_kernel_says_exactly_what_it_saves(save):
    assert T * K * experts(save)[1].saved_bytes_per_row(2) == run(save)[1]


def test_recompute_changes_no_bit():
    """The activation is always computed from the rounded pre-activation."""
    first = run("pre_activation")[0]
    second = run("recompute")[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fp8_costs_a_few_percent_in_gradients_only():
    """e4m3 has a rounding error of up to 1/16, 2.5 % on average. The output does not see it."""
    exact = run("pre_activation")[0]
    quantized = run("fp8")[0]
    assert torch.equal(exact["y"], quantized["y"])
    errors = {
        name: relative_error(quantized[name], exact[name])
        for name in ("x", "up", "down", "weights")
    }
    assert all(0 < error < 0.06 for error in errors.values()), errors


def test_unknown_mode_is_named():
    with pytest.raises(
        ConfigError,
        match=r"backends\.experts\.save is 'fp4'; known are: pre_activation, fp8, recompute",
    ):
        experts("fp4")
