"""Standard tests of routers: the top-k algorithm with every option of RoutingRule."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.backend import Kind
from tokenyard.interfaces import logits_dtype
from tokenyard.numerics import relative_error
from tokenyard.testing import _router_oracle as oracle
from tokenyard.testing._compare import assert_close, poisoned_memory
from tokenyard.testing._in_layer import LayerPartConformance
from tokenyard.workload import RoutingRule, Workload

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
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RouterConformance(LayerPartConformance):
    """What every router must do that computes the algorithm 'topk'."""

    kind: ClassVar[Kind] = "router"
    dim: ClassVar[int] = 24
    num_experts: ClassVar[int] = 8
    top_k: ClassVar[int] = 3

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_oracle(self, dtype: torch.dtype, rule: RoutingRule) -> None:
        """Logits and weights and their gradients; the selection is exactly what the router's own logits demand."""
        router, x = self._router(rule, dtype), self._tokens(67, dtype)
        weight, bias = router.weight, router.selection_bias if rule.bias_update_rate else None
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
        given = x.detach(), weight.detach(), torch.tensor(chosen, device=x.device), rule, gradients
        plain, exact = (oracle.plain(*given, d) for d in (dtype, torch.float64))
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

    @pytest.mark.parametrize("power", [1, 1.5, 2])
    def test_norms_of_small_weights(self, power: float) -> None:
        """Sigmoids of logits around -55, whose squares are no float32 any more, are normalised all the same."""
        rule = RoutingRule(score="sigmoid", normalize=power)
        router, x = self._router(rule, torch.float32), self._tokens(9, torch.float32)
        with torch.no_grad():
            router.weight.uniform_(-1.0, -0.9)
            x.uniform_(53 / self.dim, 60 / self.dim)
        gradients = [torch.randn(9, n, device=x.device) for n in (self.top_k, self.num_experts)]
        routing = router(x)
        got, ids = oracle.results(routing, x, router.weight, gradients), routing.topk_ids.long()
        exact = oracle.plain(
            x.detach(), router.weight.detach(), ids, rule, gradients, torch.float64
        )
        for name, result in got.items():
            assert relative_error(result, exact[name]) < 1e-5, name

    def test_no_tokens(self) -> None:
        """T = 0 gives an empty routing and zero sums."""
        router = self._router(RoutingRule(normalize=1), torch.float32)
        routing = router(self._tokens(0, torch.float32))
        assert [tuple(t.shape) for t in routing] == [
            (0, self.top_k),
            (0, self.top_k),
            (0, self.num_experts),
        ]
        assert not router.balance(routing).counts.any()

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
    def test_given_ids_are_only_weighted(self, rule: RoutingRule) -> None:
        """Replayed ids come back as they are, dropped ones included, which weigh nothing and have no gradient."""
        router, x = self._router(rule, torch.float32), self._tokens(20, torch.float32)
        ids = torch.randint(
            0, self.num_experts + 2, (20, self.top_k), device=x.device, dtype=torch.int32
        )
        ids[0] = self.num_experts
        routing = router(x, ids)
        assert torch.equal(routing.topk_ids, ids)
        assert not routing.topk_weights[ids >= self.num_experts].any()
        (gradient,) = torch.autograd.grad(routing.topk_weights.sum(), x)
        assert gradient.isfinite().all()
        assert not gradient[0].any()

    def test_replaying_the_own_selection_changes_nothing(self) -> None:
        """Routing with the ids that the router chose itself gives the same weights, bit by bit."""
        router, x = (
            self._router(RULES["sigmoid with selection bias"], torch.float32),
            self._tokens(40, torch.float32),
        )
        first = router(x)
        for a, b in zip(first, router(x, first.topk_ids)):
            assert torch.equal(a, b)

    def test_jitter_while_training_only(self) -> None:
        """Jitter scales the router's input within its bounds, differently each time, and never in evaluation."""
        router, x = (
            self._router(RoutingRule(jitter=0.2), torch.float64),
            self._tokens(64, torch.float64),
        )
        kept = x.detach().clone()
        calm = router.eval()(x).logits
        assert torch.equal(calm, router(x).logits)
        router.train()
        first, second = router(x).logits, router(x).logits
        assert torch.equal(x, kept), "jitter must not change x itself"
        assert not torch.equal(first, second)
        bound = 0.2 * (x.abs() @ router.weight.abs().T)
        assert ((first - calm).abs() <= bound * (1 + 1e-9)).all()

    def test_balance_sums(self) -> None:
        """Counts include slots dropped for capacity; probabilities and z are sums over tokens, with gradients."""
        router, x = self._router(RULES["capacity"], torch.float64), self._tokens(50, torch.float64)
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
        """Overloaded experts lose the update rate, underloaded ones gain it; forward alone changes no state."""
        router = self._router(RULES["sigmoid with selection bias"], torch.float32)
        before = router.selection_bias.clone()
        router(self._tokens(30, torch.float32))
        assert torch.equal(router.selection_bias, before)
        others = [0] * (self.num_experts - 2)
        router.update(5 + torch.tensor([4, -4, *others], device=before.device))
        assert torch.allclose(
            router.selection_bias - before, torch.tensor([-0.01, 0.01, *others]).to(before)
        )

    def test_parameters_are_core_s(self) -> None:
        """Swapping routers never changes a state dict: `weight` [E, D], and `selection_bias` [E] where there is one."""
        names = {
            name for name, _ in self._router(RoutingRule(), torch.float32).state_dict().items()
        }
        biased = self._router(RULES["sigmoid with selection bias"], torch.float32).state_dict()
        assert names == {"weight"}
        assert {name: tuple(t.shape) for name, t in biased.items()} == {
            "weight": (self.num_experts, self.dim),
            "selection_bias": (self.num_experts,),
        }
        assert biased["selection_bias"].dtype == torch.float32

    def test_autocast_routes_like_low_precision(self) -> None:
        """Under autocast, float32 operands give bit by bit the logits of the same operands cast beforehand."""
        router, x = (
            self._router(RoutingRule(), torch.float32),
            self._tokens(33, torch.float32).detach(),
        )
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            cast = router(x)
        router.weight.data = router.weight.data.to(torch.bfloat16)
        plain = router(x.to(torch.bfloat16))
        for a, b in zip(cast, plain):
            assert torch.equal(a, b)

    def test_compiles_whole(self) -> None:
        """``torch.compile(fullgraph=True)`` gives the same."""
        torch.compiler.reset()
        router, x = (
            self._router(RULES["best groups by two, biased"], torch.float32),
            self._tokens(30, torch.float32),
        )
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        want, got = router(x), compiled(x)
        assert torch.equal(got.topk_ids, want.topk_ids)
        assert relative_error(got.topk_weights, want.topk_weights) < 1e-5

    def _router(self, rule: RoutingRule, dtype: torch.dtype) -> Any:
        workload = Workload(
            self.dim,
            self.dim,
            self.num_experts,
            self.top_k,
            router=rule,
            dtype=dtype,
            device=self.run_device(),
        )
        with torch.device(workload.device):
            router = self.construct(workload, workload=workload)
        router.weight.data = torch.randn_like(router.weight).to(dtype) * self.dim**-0.5
        if rule.bias_update_rate:
            router.selection_bias.copy_(0.3 * torch.randn(self.num_experts))
        return router

    def _tokens(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(count, self.dim, dtype=dtype, device=self.run_device()).requires_grad_()
