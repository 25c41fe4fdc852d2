"""Standard tests of top-k routers, with every option of RoutingRule."""

from __future__ import annotations

import pytest
import torch

from tokenyard.interfaces import logits_dtype
from tokenyard.testing import _router_oracle as oracle
from tokenyard.testing._compare import assert_close, poisoned_memory
from tokenyard.testing._router_contract import DTYPES, RouterContract
from tokenyard.tolerance import relative_error
from tokenyard.workload import RoutingRule

RULES = {
    "softmax": RoutingRule(),
    "softmax, p-norm 1": RoutingRule(normalize=1),
    "softmax, p-norm 2": RoutingRule(normalize=2),
    "softmax of the selected": RoutingRule(select_first=True),
    "sigmoid, normalised, scaled": RoutingRule(score="sigmoid", normalize=1, scale=2.5),
    "sigmoid with selection bias": RoutingRule(score="sigmoid", normalize=1, bias_update_rate=0.01),
    "best groups": RoutingRule(num_groups=4, groups_kept=2),
    "best groups by two, biased": RoutingRule(
        "topk", "sigmoid", num_groups=4, groups_kept=2, group_score="top2", bias_update_rate=0.01
    ),
    "capacity": RoutingRule(capacity_factor=1.0),
}


class TopKRouterConformance(RouterContract):
    """Standard tests of every router of the algorithm 'topk', in addition to `RouterContract`."""

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_oracle(self, dtype: torch.dtype, rule: RoutingRule) -> None:
        """Logits, weights and gradients match the oracle, and ids follow exactly from the logits.

        If only low precision fails, accumulate logits in float32.
        """
        router = self._router(rule, dtype)
        x = self._tokens(67, dtype)
        weight = router.weight
        bias = router.selection_bias if rule.bias_update_rate else None
        gradients = [
            torch.randn(67, n, dtype=logits_dtype(dtype), device=x.device)
            for n in (self.top_k, self.num_experts)
        ]
        with poisoned_memory():
            routing = router(x)
            got = oracle.results(routing, x, weight, gradients)
        chosen = oracle.select(routing.logits.detach(), bias, rule, self.top_k)
        assert routing.topk_ids.dtype == torch.int32
        assert routing.topk_ids.tolist() == oracle.within_capacity(chosen, rule, self.num_experts)
        selected = torch.tensor(chosen, device=x.device)
        plain, exact = (
            oracle.plain(x.detach(), weight.detach(), selected, rule, gradients, d)
            for d in (dtype, torch.float64)
        )
        assert_close(got, plain, exact)

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
    def test_equal_scores_go_to_the_lowest_id(self, rule: RoutingRule) -> None:
        """With equal logits everywhere, experts 0 to K - 1 are chosen, in this order."""
        router = self._router(rule, torch.float32)
        with torch.no_grad():
            router.weight.copy_(router.weight[:1].expand_as(router.weight))
            if rule.bias_update_rate:
                router.selection_bias.zero_()
        ids = router(self._tokens(5, torch.float32)).topk_ids
        chosen = torch.where(ids > self.num_experts, ids - self.num_experts - 1, ids)
        assert chosen.tolist() == [list(range(self.top_k))] * 5

    @pytest.mark.parametrize("factor", [0.1, 1.0, 1.25])
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
    def test_capacity_of_few_tokens(self, tokens: int, factor: float) -> None:
        """A capacity that rounds down to 0 drops no slot; a capacity of 1 or more holds."""
        rule = RoutingRule(capacity_factor=factor)
        router = self._router(rule, torch.float32)
        routing = router(self._tokens(tokens, torch.float32))
        chosen = oracle.select(routing.logits.detach(), None, rule, self.top_k)
        assert routing.topk_ids.tolist() == oracle.within_capacity(chosen, rule, self.num_experts)

    @pytest.mark.parametrize("power", [1, 1.5, 2])
    def test_norms_of_small_weights(self, power: float) -> None:
        """Sigmoids of logits near -55, whose squares underflow in float32, are normalised."""
        rule = RoutingRule(score="sigmoid", normalize=power)
        router = self._router(rule, torch.float32)
        x = self._tokens(9, torch.float32)
        with torch.no_grad():
            router.weight.uniform_(-1.0, -0.9)
            x.uniform_(53 / self.dim, 60 / self.dim)
        gradients = [torch.randn(9, n, device=x.device) for n in (self.top_k, self.num_experts)]
        routing = router(x)
        got = oracle.results(routing, x, router.weight, gradients)
        ids = routing.topk_ids.long()
        exact = oracle.plain(
            x.detach(), router.weight.detach(), ids, rule, gradients, torch.float64
        )
        for name, result in got.items():
            assert relative_error(result, exact[name]) < 1e-5, name

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
    def test_given_ids_are_only_weighted_by_every_rule(self, rule: RoutingRule) -> None:
        """As `test_given_ids_are_only_weighted`, for every option of RoutingRule."""
        self._check_replay(rule)

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
    def test_padding_takes_part_in_nothing_by_every_rule(self, rule: RoutingRule) -> None:
        """As `test_padding_takes_part_in_nothing`, for every option: capacity, too."""
        self._check_padding(rule)

    def test_replay_ignores_the_selection_bias(self) -> None:
        """Replaying the selection of a biased router gives the same weights, bit by bit."""
        router = self._router(RULES["sigmoid with selection bias"], torch.float32)
        x = self._tokens(40, torch.float32)
        first = router(x)
        for a, b in zip(first, router(x, first.topk_ids)):
            assert torch.equal(a, b)

    def test_jitter_while_training_only(self) -> None:
        """Jitter scales the router's input within its bounds, anew each time, in training only."""
        router = self._router(RoutingRule(jitter=0.2), torch.float64)
        x = self._tokens(64, torch.float64)
        kept = x.detach().clone()
        calm = router.eval()(x).logits
        assert torch.equal(calm, router(x).logits)
        router.train()
        first = router(x).logits
        second = router(x).logits
        assert torch.equal(x, kept), "jitter must not change x itself"
        assert not torch.equal(first, second)
        bound = 0.2 * (x.abs() @ router.weight.abs().T)
        assert ((first - calm).abs() <= bound * (1 + 1e-9)).all()

    def test_balance_sums(self) -> None:
        """Counts include slots dropped for capacity; probabilities and z are sums over tokens."""
        router = self._router(RULES["capacity"], torch.float64)
        x = self._tokens(50, torch.float64)
        routing = router(x)
        balance = router.balance(routing)
        chosen = torch.tensor(
            oracle.select(routing.logits.detach(), None, RULES["capacity"], self.top_k)
        )
        assert balance.counts.tolist() == [
            (chosen == e).sum().item() for e in range(self.num_experts)
        ]
        assert balance.dropped.item() == (routing.topk_ids >= self.num_experts).sum().item()
        exp = routing.logits.exp()
        assert relative_error(balance.prob_sum, (exp / exp.sum(1, keepdim=True)).sum(0)) < 1e-13
        assert relative_error(balance.z_sum, exp.sum(1).log().square().sum()) < 1e-13
        assert balance.prob_sum.requires_grad
        assert balance.z_sum.requires_grad

    def test_update_moves_the_selection_bias(self) -> None:
        """Overloaded experts lose the update rate, underloaded ones gain it."""
        router = self._router(RULES["sigmoid with selection bias"], torch.float32)
        before = router.selection_bias.clone()
        others = [0] * (self.num_experts - 2)
        router.update(5 + torch.tensor([4, -4, *others], device=before.device))
        assert torch.allclose(
            router.selection_bias - before, torch.tensor([-0.01, 0.01, *others]).to(before)
        )

    def test_parameters_are_those_of_core(self) -> None:
        """Swapping routers never changes a state dict.

        It holds `weight` [E, D], and `selection_bias` [E] if the rule has one.
        """
        names = set(self._router(RoutingRule(), torch.float32).state_dict())
        biased = self._router(RULES["sigmoid with selection bias"], torch.float32).state_dict()
        assert names == {"weight"}
        assert {name: tuple(t.shape) for name, t in biased.items()} == {
            "weight": (self.num_experts, self.dim),
            "selection_bias": (self.num_experts,),
        }
        assert biased["selection_bias"].dtype == torch.float32

    def test_compiles_whole_with_groups_and_bias(self) -> None:
        """``torch.compile(fullgraph=True)`` gives the same for grouped and biased selection."""
        self._check_compiled(RULES["best groups by two, biased"])
