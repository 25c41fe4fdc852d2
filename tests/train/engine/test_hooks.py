"""Hooks that a model got after its graph was made."""

import pytest
from torch import nn

from tokenyard_train.engine.hooks import Hooks


def hook(*_):
    return None


@pytest.fixture
def model():
    """A model with a hook of its own, which is part of its forward pass."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_forward_hook(hook)
    return model


def test_hooks_of_the_model_itself_are_part_of_its_forward_pass(model):
    assert Hooks(model).changed() is None


@pytest.mark.parametrize(
    "register",
    [
        lambda model: model[1].register_forward_hook(hook),
        lambda model: model[1].register_forward_pre_hook(hook),
        lambda model: model[1].register_full_backward_hook(hook),
        lambda model: model[1].weight.register_hook(hook),
        lambda model: model[1].weight.register_post_accumulate_grad_hook(hook),
    ],
    ids=["forward", "pre", "backward", "tensor", "gradient"],
)
def test_a_later_hook_is_noticed_until_it_is_removed(model, register):
    hooks = Hooks(model)
    handle = register(model)
    assert hooks.changed() == "1 got a hook, which a graph does not call"
    handle.remove()
    assert hooks.changed() is None
