"""Routing algorithms that balance the tokens of a batch."""

from dataclasses import replace

import pytest
import torch

from tokenyard import BackendError, ConfigError, MoE, RoutingRule, Workload
from tokenyard.testing import RouterContract

E, K = 8, 3
ALGORITHMS = ("expert_choice", "sinkhorn", "token_rounding")


class TestExpertChoice(RouterContract):
    backend = "expert_choice"
    rule = RoutingRule("expert_choice", options={"factor": 1.5})
    device = "cpu"


class TestSinkhorn(RouterContract):
    backend = "sinkhorn"
    rule = RoutingRule("sinkhorn", score="sigmoid", normalize=1.0, num_groups=2)
    device = "cpu"


class TestTokenRounding(RouterContract):
    backend = "token_rounding"
    rule = RoutingRule("token_rounding", options={"tile": 4, "spare": 1})
    device = "cpu"


@pytest.mark.gpu
class TestExpertChoiceOnGpu(RouterContract):
    backend = "expert_choice"
    rule = RoutingRule("expert_choice")
    device = "cuda"


@pytest.mark.gpu
class TestSinkhornOnGpu(RouterContract):
    backend = "sinkhorn"
    rule = RoutingRule("sinkhorn")
    device = "cuda"


@pytest.mark.gpu
class TestTokenRoundingOnGpu(RouterContract):
    backend = "token_rounding"
    rule = RoutingRule("token_rounding", options={"tile": 8})
    device = "cuda"


def router_of(algorithm: str, bias_update_rate: float = 0.0, **options):
    rule = RoutingRule(algorithm, bias_update_rate=bias_update_rate, options=options)
    router = MoE(Workload(16, 16, E, K, router=rule)).router
    torch.manual_seed(5)
    torch.nn.init.normal_(router.weight)
    # most tokens prefer the first experts
    router.weight.data[:2] += 1.0
    return router


def tokens(count: int) -> torch.Tensor:
    torch.manual_seed(6)
    return torch.randn(count, 16) + 0.3


def counts_of(router, x: torch.Tensor) -> torch.Tensor:
    ids = router(x).topk_ids.flatten()
    return torch.bincount(ids[ids < E], minlength=E)


def test_every_expert_chooses_equally_many_tokens():
    """If no token is wanted by more than K experts."""
    router = router_of("expert_choice", factor=1 / 3)
    assert counts_of(router, tokens(64)).tolist() == [8] * E


def test_an_expert_chooses_its_highest_scores():
    router = router_of("expert_choice", factor=0.5)
    x = tokens(64)
    routing = router(x)
    scores = routing.logits.softmax(-1)
    highest = scores.topk(12, dim=0).indices  # [C, E]
    for token, row in enumerate(routing.topk_ids.tolist()):
        for expert in row:
            assert expert == E or token in highest[:, expert]


@pytest.mark.parametrize("spare", [0, 1])
def test_rounded_counts_are_multiples_of_the_tile(spare):
    x = tokens(512)
    router = router_of("token_rounding", tile=16, spare=spare)
    rounded = counts_of(router, x)
    chosen = counts_of(router.eval(), x)
    assert chosen.sum() == 512 * (K - spare)
    assert (chosen % 16).any()
    assert not (rounded % 16).any()
    assert ((rounded - chosen).abs() < 2 * 16).all()
    if spare:  # enough free slots for every expert that rounds up
        assert ((rounded - chosen).abs() <= 8).all()


def test_rounding_keeps_the_highest_scores():
    """Of two tokens that chose an expert, the one that it drops has the lower score."""
    x = tokens(512)
    router = router_of("token_rounding", tile=16)
    routing = router(x)
    scores = routing.logits.softmax(-1)
    chosen = router.eval()(x).topk_ids
    for expert in range(E):
        was_chosen = (chosen == expert).any(1)
        kept = (routing.topk_ids == expert).any(1)
        if (was_chosen & ~kept).any():
            dropped = scores[was_chosen & ~kept, expert].max()
            assert scores[was_chosen & kept, expert].min() >= dropped


def test_few_tokens_are_not_rounded():
    router = router_of("token_rounding")
    assert counts_of(router, tokens(300)).sum() == 300 * K


def test_sinkhorn_balances_what_topk_does_not():
    x = tokens(1024)
    topk = counts_of(router_of("topk"), x)
    balanced = counts_of(router_of("sinkhorn"), x)
    mean = 1024 * K / E
    assert balanced.sum() == topk.sum()
    assert topk.max() > 1.8 * mean
    assert balanced.max() < 1.3 * mean


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tokens_are_independent_in_evaluation_only(algorithm):
    """Then the routing of a token does not depend on later tokens."""
    router = router_of(algorithm, **({"tile": 16} if algorithm == "token_rounding" else {}))
    x = tokens(512)
    other = torch.cat([x[:256], tokens(512)[256:] * 3])
    assert not torch.equal(router(x).topk_ids[:256], router(other).topk_ids[:256])
    router.eval()
    assert torch.equal(router(x).topk_ids[:256], router(other).topk_ids[:256])
    assert torch.equal(router(x).topk_ids, router_of("topk")(x).topk_ids)


def test_experts_may_choose_in_evaluation():
    x = tokens(64)
    router = router_of("expert_choice", evaluate_batch=True)
    assert torch.equal(router(x).topk_ids, router.eval()(x).topk_ids)


def test_rounding_goes_with_a_selection_bias():
    router = router_of("token_rounding", bias_update_rate=0.01, tile=16)
    router.update(counts_of(router, tokens(512)))
    assert router.selection_bias.any()


@pytest.mark.parametrize(
    ("algorithm", "options", "sentence"),
    [
        ("expert_choice", {"factor": 0}, r"'factor' .* is 0; give a finite number above 0"),
        ("expert_choice", {"factor": "1"}, r"'factor' .* is '1'; give a finite number above 0"),
        ("expert_choice", {"evaluate_batch": 1}, r"'evaluate_batch' .* is 1; give true or false"),
        ("sinkhorn", {"iterations": 0}, r"'iterations' .* is 0; give an integer of at least 1"),
        ("token_rounding", {"tile": 1.5}, r"'tile' .* is 1.5; give an integer of at least 1"),
        ("token_rounding", {"spare": K}, r"'spare' is 3, but a token has 3 slots; choose from 0"),
        ("sinkhorn", {"iteration": 3}, r"did you mean 'iterations'"),
    ],
)
def test_wrong_options_are_named(algorithm, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        router_of(algorithm, **options)


@pytest.mark.parametrize(
    ("algorithm", "field", "value"),
    [
        ("expert_choice", "bias_update_rate", 0.01),
        ("expert_choice", "num_groups", 2),
        ("sinkhorn", "bias_update_rate", 0.01),
        ("token_rounding", "capacity_factor", 1.0),
    ],
)
def test_unused_fields_of_the_rule_are_refused(algorithm, field, value):
    rule = replace(RoutingRule(algorithm), **{field: value})
    with pytest.raises(BackendError, match=f"'{algorithm}' does not use {field}; leave it out"):
        MoE(Workload(16, 16, E, K, router=rule))
