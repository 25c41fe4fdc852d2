"""Routing statistics of a step: values by hand."""

import math

import pytest

from tokenyard_train.engine.step import train_step
from tokenyard_train.records.routing import routing_stats

from .balances import balance, stacked


def test_a_uniform_load():
    (layer,) = routing_stats(
        stacked(balance([3, 3, 3, 3], [1.5] * 4, z_sum=12)), 6, top_k=2, convention="megablocks"
    )
    assert layer == pytest.approx((1.0, 1.0, 0, 0.0, 1.0, 2.0))


def test_all_tokens_to_one_expert():
    (layer,) = routing_stats(
        stacked(balance([6, 0, 0], [6.0, 0, 0])), tokens=6, top_k=1, convention="megablocks"
    )
    assert layer == pytest.approx((0.0, 3.0, 2, 0.0, 3.0, 0.0))


def test_half_of_the_experts_take_all_tokens():
    """Two equal shares have one bit of entropy, and four have two."""
    (layer,) = routing_stats(
        stacked(balance([4, 4, 0, 0], [2.0] * 4, dropped=2)), 8, 1, "megablocks"
    )
    assert (layer.entropy, layer.busiest, layer.idle, layer.dropped) == pytest.approx(
        (0.5, 2.0, 2, 0.25)
    )


def test_each_layer_has_its_own_balance_loss():
    """Pooled over layers, as in transformers, two opposite imbalances would cancel."""
    pair = stacked(balance([4, 0], [4.0, 0.0]), balance([0, 4], [0.0, 4.0]))
    layers = routing_stats(pair, tokens=4, top_k=1, convention="hf")
    assert [layer.balance_loss for layer in layers] == [2.0, 2.0]


def test_a_single_expert_is_always_balanced():
    (layer,) = routing_stats(stacked(balance([4], [4.0])), 4, 1, "megablocks")
    assert layer.entropy == layer.busiest == 1.0


def test_a_step_reports_every_layer(build):
    result = train_step(build(), 0).result
    assert len(result.routing) == len(result.load) == 2
    for layer, load in zip(result.routing, result.load):
        assert layer["busiest"] == pytest.approx(4 * max(load), abs=1e-5)
        assert layer["entropy"] == pytest.approx(-sum(p * math.log(p, 4) for p in load), abs=1e-4)
    assert result.balance_loss == pytest.approx(
        sum(layer["balance_loss"] for layer in result.routing) / 2
    )
    assert result.z_loss == pytest.approx(sum(layer["z_loss"] for layer in result.routing) / 2)


def test_a_dense_model_has_no_routing(build):
    assert (
        train_step(
            build(model={"name": "mpt_causal_lm", "size": "tiny", "d_model": 16}), 0
        ).result.routing
        == []
    )
