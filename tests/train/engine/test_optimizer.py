"""AdamW against torch's, masters of weights, and what changes nothing."""

import math

import pytest
import torch
from torch import nn

from tokenyard_train.config.optimizer import OptimizerConfig
from tokenyard_train.engine.optimizer import build_optimizer


def test_frozen_parameters_are_not_in_the_optimizer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    (group,) = build_optimizer(OptimizerConfig(), model).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model[1].parameters()]


def test_a_group_that_is_added_after_a_step_is_an_error():
    """It would never be updated."""
    optimizer = build_optimizer(OptimizerConfig(name="adamw", lr=0.1), nn.Linear(2, 2))
    optimizer.step()
    optimizer.add_param_group(optimizer.param_groups[0] | {"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="zip"):
        optimizer.step()


def test_adamw_equals_the_fused_adamw_of_torch_bit_for_bit():
    """A parameter without a gradient does not change."""
    model = nn.Linear(7, 5)
    reference = nn.Linear(7, 5)
    reference.load_state_dict(model.state_dict())
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = build_optimizer(OptimizerConfig(name="adamw", **options), model)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), **options, fused=True)
    for step in range(5):
        gradient = torch.randn(5, 7)
        for module in (model, reference):
            module.weight.grad = gradient.clone()
            module.bias.grad = gradient.sum(1) if step % 2 else None
        optimizer.step()
        reference_optimizer.step()
        pairs = zip(model.parameters(), reference.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32])
def test_masters_follow_the_formula_and_weights_are_their_rounding(gradient_dtype):
    model = nn.Linear(5, 4)
    reference = nn.Linear(5, 4)
    reference.load_state_dict(model.state_dict())
    options = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer, exact = (
        build_optimizer(OptimizerConfig(**options), module) for module in (model, reference)
    )
    optimizer.narrow_weights(model)
    for _ in range(5):
        gradient = torch.randn(4, 5).to(gradient_dtype)
        for module in (model, reference):
            for p, value in zip(module.parameters(), (gradient, gradient.sum(1))):
                p.grad_dtype = None
                p.grad = value.to(gradient_dtype if module is model else torch.float32)
        optimizer.step()
        exact.step()
    for p, q in zip(model.parameters(), reference.parameters()):
        assert p.dtype == torch.bfloat16
        assert torch.equal(optimizer.master_of(p), q)
        assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("scale", [math.nan, math.inf])
@pytest.mark.parametrize("masters", [False, True])
def test_a_scale_that_is_not_finite_changes_nothing(scale, masters):
    model = nn.Linear(5, 4)
    optimizer = build_optimizer(OptimizerConfig(), model)
    if masters:
        optimizer.narrow_weights(model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(scale=torch.tensor(scale))
    for p, old in zip(model.parameters(), before):
        assert torch.equal(p, old)
        state = optimizer.state_of(p)
        assert state["step"] == 0
        assert not state["exp_avg"].any()
