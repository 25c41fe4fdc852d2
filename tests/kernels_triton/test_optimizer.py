"""AdamW in one launch, against its formula in float64; in the interpreter on a CPU."""

import pytest
import torch

from tokenyard.tolerance import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((5000,), (3, 7), (2048,), (1,), (0,))
LR, B1, B2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1


def build(weight_dtype):
    """Return an optimizer of random tensors, and their float64 copies."""
    from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW

    masters = [torch.randn(size, device=DEVICE) for size in SIZES]
    exact = [master.double() for master in masters]
    tensors = []
    for master in masters:
        weight = master if weight_dtype == torch.float32 else master.to(weight_dtype)
        moments = (torch.zeros_like(master), torch.zeros_like(master))
        tensors.append(AdamWTensors(weight, master, *moments))
    return FusedAdamW(tensors, torch.zeros(len(tensors), device=DEVICE)), exact


def settings():
    from tokenyard_kernels_triton.optimizer import AdamWSettings

    return AdamWSettings(LR, (B1, B2), EPS, DECAY)


def formula(p, m, v, gradient, step):
    m = B1 * m + (1 - B1) * gradient
    v = B2 * v + (1 - B2) * gradient**2
    change = (m / (1 - B1**step)) / ((v / (1 - B2**step)).sqrt() + EPS)
    return p * (1 - LR * DECAY) - LR * change, m, v


@pytest.mark.parametrize(
    ("weight", "gradient"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_steps_follow_the_formula(weight, gradient):
    """Steps whose scale is not finite change nothing, nor do parameters without a gradient."""
    optimizer, exact = build(weight)
    states = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in exact]
    for step in range(1, 6):
        gradients = [torch.randn(size, device=DEVICE).to(gradient) for size in SIZES]
        without = [*gradients[:1], None, *gradients[2:]]
        optimizer.step(without, torch.tensor(0.5, device=DEVICE), settings())
        for scale in (float("nan"), float("inf")):
            optimizer.step(gradients, torch.tensor(scale, device=DEVICE), settings())
        for i, g in enumerate(without):
            if g is not None:
                states[i] = formula(*states[i], 0.5 * g.double(), step)
    assert optimizer.steps.tolist() == [5, 0, 5, 5, 5]
    for tensors, (p, m, v) in zip(optimizer.parameters, states):
        for got, want in ((tensors.master, p), (tensors.exp_avg, m), (tensors.exp_avg_sq, v)):
            assert relative_error(got, want) < 1e-6
        # Triton's interpreter truncates to bfloat16.
        assert relative_error(tensors.weight, p) < 2 * torch.finfo(weight).eps


def test_addresses_that_are_not_aligned():
    from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW

    flat = torch.randn(4, 5001, device=DEVICE)
    flat[2:] = 0
    exact = (flat[0, 1:].double(), flat[2, 1:].double(), flat[3, 1:].double())
    optimizer = FusedAdamW(
        [AdamWTensors(flat[0, 1:], flat[0, 1:], flat[2, 1:], flat[3, 1:])],
        torch.zeros(1, device=DEVICE),
    )
    optimizer.step([flat[1, 1:]], torch.ones((), device=DEVICE), settings())
    want = formula(*exact, flat[1, 1:].double(), 1)
    assert relative_error(flat[0, 1:], want[0]) < 1e-6


@pytest.mark.gpu
def test_weights_are_the_rounding_of_masters():
    optimizer, _ = build(torch.bfloat16)
    gradients = [torch.randn(size, device=DEVICE).bfloat16() for size in SIZES]
    optimizer.step(gradients, torch.ones((), device=DEVICE), settings())
    for tensors in optimizer.parameters:
        assert torch.equal(tensors.weight, tensors.master.bfloat16())
