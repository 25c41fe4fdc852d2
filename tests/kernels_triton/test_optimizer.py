"""AdamW in one launch, against its formula in float64; in the interpreter on a CPU."""

import pytest
import torch

from tokenyard.tolerance import relative_error
from tokenyard_train.engine.adamw import MOMENTS as NAMES
from tokenyard_train.engine.moments import SCALE, new_moment, read_moment, write_moment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((5000,), (3, 7), (2048,), (1,), (0,))
LR, B1, B2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1


def build(weight_dtype):
    """Return an optimizer of random tensors, and their float64 copies."""
    from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW

    # Away from 0, where an update could cancel a weight and leave its rounding error alone
    masters = [torch.rand(size, device=DEVICE) + 0.5 for size in SIZES]
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
        # Each step rounds float32 once, and Triton's interpreter truncates to bfloat16.
        assert relative_error(tensors.weight, p) < max(1e-6, 2 * torch.finfo(weight).eps)


def test_a_beta_of_zero_and_many_steps():
    """The first moment is then the gradient, and both corrections are 1."""
    from tokenyard_kernels_triton.optimizer import AdamWSettings

    optimizer, (exact, *_) = build(torch.float32)
    optimizer.steps += 100_000
    gradients = [torch.randn(size, device=DEVICE) for size in SIZES]
    beta = 0.9999
    optimizer.step(
        gradients, torch.ones((), device=DEVICE), AdamWSettings(LR, (0.0, beta), EPS, DECAY)
    )
    gradient = gradients[0].double()
    root = ((1 - beta) * gradient**2 / (1 - beta**100_001)).sqrt()
    want = exact * (1 - LR * DECAY) - LR * gradient / (root + EPS)
    assert relative_error(optimizer.parameters[0].master, want) < 1e-6


def test_a_step_gives_weights_a_new_version():
    """The kernel writes by addresses, and copies of weights are made again for a new version."""
    optimizer, _ = build(torch.bfloat16)
    versions = [tensors.weight._version for tensors in optimizer.parameters]
    gradients = [torch.randn(size, device=DEVICE) for size in SIZES]
    optimizer.step(gradients, torch.tensor(1.0, device=DEVICE), settings())
    assert all(t.weight._version > old for t, old in zip(optimizer.parameters, versions))


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


def stored(moments, sizes):
    """Return an optimizer with moments in bfloat16 or 8 bits, and states of the plain path."""
    from tokenyard_kernels_triton.optimizer import AdamWTensors, FusedAdamW

    tensors = []
    states = []
    for size in sizes:
        master = torch.randn(size, device=DEVICE)
        ours, plain = ({}, {})
        for state in (ours, plain):
            for name in NAMES:
                state |= new_moment(name, master, moments)
        tensors.append(
            AdamWTensors(master.bfloat16(), master, *(ours[n] for n in sorted(ours, key=len)))
        )
        states.append((ours, plain, master.clone()))
    return FusedAdamW(tensors, torch.zeros(len(tensors), device=DEVICE)), states


@pytest.mark.parametrize(
    ("moments", "sizes"),
    [
        ("bf16", ((5000,), (3, 7), (1,))),
        ("8bit", ((5, 512), (2, 3, 768), (1, 256))),  # blocks of 256, in part beyond a program's
        ("8bit", ((7, 64), (3, 3 * 64))),  # of 64
    ],
)
def test_moments_are_stored_as_without_the_kernel(moments, sizes):
    """Each step starts from equal states. Values in the middle of two codes may be either."""
    optimizer, states = stored(moments, sizes)
    for step in range(1, 5):
        gradients = [torch.randn(size, device=DEVICE) ** 3 for size in sizes]
        gradients[0][..., : len(gradients[0]) // 2] = 0
        optimizer.step(gradients, torch.tensor(0.5, device=DEVICE), settings())
        for tensors, (ours, plain, master), gradient in zip(
            optimizer.parameters, states, gradients
        ):
            m, v = (read_moment(plain, name) for name in NAMES)
            want, m, v = formula(master, m, v, 0.5 * gradient, step)
            assert relative_error(tensors.master, want) < 1e-6
            for name, value in zip(NAMES, (m, v)):
                write_moment(plain, name, value)
                got = read_moment(ours, name)
                # Triton's interpreter truncates to bfloat16.
                assert relative_error(got, read_moment(plain, name)) < 1e-2
                if moments == "8bit":
                    assert (ours[name] != plain[name]).float().mean() < 2e-3
            master.copy_(tensors.master)
            for key, tensor in ours.items():
                plain[key].copy_(tensor)


def test_every_code_of_8_bits_is_read_and_written():
    """All values of the map survive a step without a gradient or a decay."""
    from tokenyard_kernels_triton.optimizer import AdamWSettings

    optimizer, states = stored("8bit", ((1, 256),))
    ours = states[0][0]
    for name, codes in zip(NAMES, (torch.arange(256), torch.arange(256))):
        ours[name].copy_(codes.view(1, 256))
        ours[name + SCALE].fill_(3.0)
    before = {key: tensor.clone() for key, tensor in ours.items()}
    still = AdamWSettings(0.0, (1 - 1e-9, 1 - 1e-9), EPS, 0.0)
    optimizer.step([torch.zeros(1, 256, device=DEVICE)], torch.ones((), device=DEVICE), still)
    assert torch.equal(ours[NAMES[0] + SCALE], before[NAMES[0] + SCALE])
    for name in NAMES:
        assert ours[name].tolist() == before[name].tolist()
