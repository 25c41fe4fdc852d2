"""Learning-rate schedules and AdamW against their formulas."""

import math

import pytest
import torch
from torch import nn

from tokenyard_train.config.schema import OptimizerConfig, SchedulerConfig
from tokenyard_train.engine.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("alpha_f", [0.0, 0.1])
@pytest.mark.parametrize(
    "name", ["cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup"]
)
def test_schedules(name, alpha_f):
    config, peak, warmup, end = SchedulerConfig(name=name, alpha_f=alpha_f), 0.3, 10, 110
    for batch in range(130):
        share = min(1, max(0, (batch - warmup) / (end - warmup)))
        after = {
            "cosine_with_warmup": alpha_f + (1 - alpha_f) * (1 + math.cos(math.pi * share)) / 2,
            "linear_decay_with_warmup": 1 + share * (alpha_f - 1),
            "constant_with_warmup": 1,
        }[name]
        want = peak * (batch / warmup if batch < warmup else after)
        assert learning_rate(config, peak, batch, warmup, end) == pytest.approx(want, rel=1e-12)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(SchedulerConfig(), 0.3, 0, warmup=0, end=10) == 0.3


@pytest.mark.parametrize("name", ["decoupled_adamw", "adamw"])
def test_adamw_step_by_step(name):
    """Ten steps at a changing rate against the update written out in float64."""
    lr, (b1, b2), eps, decay = 0.02, (0.9, 0.95), 1e-8, 0.1
    model = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    p = model.weight.detach().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    optimizer = build_optimizer(
        OptimizerConfig(name=name, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay), model
    )
    for t in range(1, 11):
        rate = lr * t / 10
        gradient = torch.randn_like(p)
        model.weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        p = p * (1 - (rate / lr if name == "decoupled_adamw" else rate) * decay)
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        p = p - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    assert (model.weight - p).norm() / p.norm() < 1e-13


def test_frozen_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    (group,) = build_optimizer(OptimizerConfig(), model).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model[1].parameters()]


def test_it_is_torch_s_fused_adamw_bit_for_bit():
    """A parameter without a gradient stays as it is."""
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    one = build_optimizer(OptimizerConfig(name="adamw", **options), ours)
    other = torch.optim.AdamW(theirs.parameters(), **options, fused=True)
    for step in range(5):
        gradient = torch.randn(5, 7)
        for model in (ours, theirs):
            model.weight.grad = gradient.clone()
            model.bias.grad = gradient.sum(1) if step % 2 else None
        one.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
