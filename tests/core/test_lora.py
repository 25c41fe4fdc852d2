"""Adapters add B A to each expert's weights, and are the only trained parameters."""

import pytest
import torch

from tokenyard import ConfigError, MoE, Workload, add_lora, merge_lora
from tokenyard.tolerance import relative_error

D = 12
F = 10
E = 5
RANK = 3
ALPHA = 6.0


@pytest.fixture
def moe():
    torch.manual_seed(1)
    return MoE(Workload(D, F, E, 2, dtype=torch.float64), dtype=torch.float64)


def adapted(moe, targets=("up", "down")):
    """Add adapters whose B is not zero."""
    add_lora(moe, RANK, ALPHA, targets)
    for name, parameter in moe.experts.adapter.named_parameters():
        if name.endswith("_b"):
            torch.nn.init.normal_(parameter)
    return moe


def tokens():
    return torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_a_new_adapter_changes_nothing(moe):
    before = moe(tokens())[0]
    add_lora(moe, RANK, ALPHA)
    assert torch.equal(moe(tokens())[0], before)


@pytest.mark.parametrize("targets", [("up",), ("down",), ("up", "down")], ids=str)
def test_only_adapters_get_gradients_and_they_follow_from_those_of_the_weights(moe, targets):
    """d B = s dW A^T and d A = s B^T dW, where dW is the gradient of the merged weights."""
    adapter = adapted(moe, targets).experts.adapter
    dy = torch.randn(40, D, dtype=torch.float64)
    moe(tokens())[0].backward(dy)
    assert {n for n, p in moe.named_parameters() if p.grad is not None} == {
        f"experts.adapter.{target}_{one}" for target in targets for one in "ab"
    }
    merged = MoE(Workload(D, F, E, 2, dtype=torch.float64), dtype=torch.float64)
    merge_lora(moe)
    merged.load_state_dict(moe.state_dict())
    merged(tokens())[0].backward(dy)
    scale = ALPHA / RANK
    for target in targets:
        dw = getattr(merged.experts, target).grad
        a, b = (getattr(adapter, f"{target}_{one}") for one in "ab")
        assert relative_error(b.grad, scale * dw @ a.mT) < 1e-12
        assert relative_error(a.grad, scale * b.mT @ dw) < 1e-12


def test_merging_computes_the_same_without_an_adapter(moe):
    before = adapted(moe)(tokens())[0]
    merge_lora(moe)
    assert not any("adapter" in name for name, _ in moe.named_parameters())
    assert relative_error(moe(tokens())[0], before) < 1e-12
    add_lora(moe, RANK, ALPHA)  # adapters can be added again


def test_mistakes(moe):
    adapted(moe)
    with pytest.raises(
        ConfigError, match="have adapters already; merge_lora makes them part of the weights"
    ):
        add_lora(moe, RANK, ALPHA)
    with pytest.raises(ConfigError, match="lora is for experts, and the model has none"):
        add_lora(torch.nn.Linear(2, 2), RANK, ALPHA)
