"""An invalid layer or rule is refused in one sentence that names the argument."""

import pytest

from tokenyard import ConfigError, RoutingRule, Workload


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"top_k": 5}, "top_k is 5 but num_experts is 4; choose top_k from 1 to 4"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"activation": "swigl"}, r"activation 'swigl' is unknown \(did you mean 'swiglu'\?\)"),
        (
            {"expert_parallel": 3},
            "expert_parallel is 3, which does not divide num_experts 4; these do: 1, 2, 4",
        ),
        (
            {"router": RoutingRule(num_groups=3)},
            "router num_groups is 3, which does not divide num_experts 4",
        ),
        ({"router": RoutingRule(num_groups=4)}, "top_k is 2 but the groups kept hold 1 experts"),
        (
            {"router": RoutingRule(num_groups=4, groups_kept=2, group_score="top2")},
            "'top2' needs 2 experts in a group",
        ),
    ],
)
def test_invalid_layers(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Workload(**{"dim": 8, "ffn_dim": 8, "num_experts": 4, "top_k": 2} | arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"score": "softmx"}, r"router score 'softmx' is unknown \(did you mean 'softmax'\?\)"),
        ({"score": "sigmoid", "select_first": True}, "select_first goes with score 'softmax'"),
        ({"jitter": 1.0}, "router jitter is 1.0; it must be at least 0 and below 1"),
        ({"normalize": 0}, "router normalize is 0; give a finite number above 0"),
        ({"normalize": float("inf")}, "router normalize is inf; give a finite number above 0"),
        (
            {"capacity_factor": float("nan")},
            "router capacity_factor is nan; give a finite number above 0",
        ),
        ({"capacity_factor": -1.0}, "router capacity_factor is -1.0"),
        ({"bias_update_rate": -0.1}, "router bias_update_rate is -0.1; it must not be negative"),
        (
            {"num_groups": 2, "groups_kept": 3},
            "router groups_kept is 3; choose from 1 to num_groups, 2",
        ),
    ],
)
def test_invalid_rules(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RoutingRule(**arguments)
