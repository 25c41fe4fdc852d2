"""Standard tests of routers of any algorithm."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tokenyard.backend import Kind
from tokenyard.interfaces import logits_dtype
from tokenyard.testing._in_layer import LayerPartConformance
from tokenyard.tolerance import relative_error
from tokenyard.workload import RoutingRule, Workload

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class RouterContract(LayerPartConformance):
    """Standard tests of every router, for any algorithm.

    `rule` names the algorithm and its options: ``RoutingRule("expert_choice", options={...})``.
    """

    kind: ClassVar[Kind] = "router"
    dim: ClassVar[int] = 24
    num_experts: ClassVar[int] = 8
    top_k: ClassVar[int] = 3

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_routing_is_well_formed(self, dtype: torch.dtype) -> None:
        """Shapes and dtypes are those of Routing, and no token takes an expert twice.

        A dropped slot has an id at or past E and weighs nothing.
        """
        router = self._router(self.rule, dtype)
        routing = router(self._tokens(67, dtype))
        wide = logits_dtype(dtype)
        ids = routing.topk_ids
        experts = self.num_experts
        assert (ids.dtype, tuple(ids.shape)) == (torch.int32, (67, self.top_k))
        assert routing.topk_weights.dtype == routing.logits.dtype == wide
        assert tuple(routing.topk_weights.shape) == (67, self.top_k)
        assert tuple(routing.logits.shape) == (67, experts)
        assert ((ids >= 0) & (ids <= 2 * experts)).all()
        for row in ids.tolist():
            kept = [e for e in row if e < experts]
            assert len(kept) == len(set(kept)), row
        assert routing.topk_weights.isfinite().all()
        assert not routing.topk_weights[ids >= experts].any()

    def test_no_tokens(self) -> None:
        """T = 0 gives an empty routing and zero sums."""
        router = self._router(self.rule, torch.float32)
        routing = router(self._tokens(0, torch.float32))
        slots = (0, self.top_k)
        assert [tuple(t.shape) for t in routing] == [slots, slots, (0, self.num_experts)]
        assert not router.balance(routing).counts.any()

    def test_names_its_options(self) -> None:
        """`rule_options` names every option of the rule. A layer refuses all others."""
        known = getattr(self.offered().load(), "rule_options", ())
        assert set(self.rule.options) <= set(known)

    def test_given_ids_are_only_weighted(self) -> None:
        """Replayed ids are returned unchanged, and dropped ones among them weigh nothing."""
        self._check_replay(self.rule)

    def test_replaying_the_routers_selection_changes_nothing(self) -> None:
        """Routing with the ids that the router selected gives the same weights, bit by bit.

        If this fails, weights are computed from more than the logits and the ids.
        """
        router = self._router(self.rule, torch.float32)
        x = self._tokens(40, torch.float32)
        first = router(x)
        for a, b in zip(first, router(x, first.topk_ids)):
            assert torch.equal(a, b)

    def test_gradients_reach_the_input_and_the_parameters(self) -> None:
        """Weights and logits are differentiable in x and in every parameter."""
        router = self._router(self.rule, torch.float32)
        x = self._tokens(40, torch.float32)
        routing = router(x)
        loss = routing.topk_weights.square().sum() + routing.logits.square().sum()
        inputs = [x, *router.parameters()]
        for gradient in torch.autograd.grad(loss, inputs, allow_unused=True):
            assert gradient is not None
            assert gradient.isfinite().all()
            assert gradient.any()

    def test_balance_counts(self) -> None:
        """`balance` counts every slot once, as its expert's or as dropped, and sums over tokens."""
        router = self._router(self.rule, torch.float64)
        routing = router(self._tokens(50, torch.float64))
        balance = router.balance(routing)
        kept = routing.topk_ids[routing.topk_ids < self.num_experts].long()
        computed = torch.bincount(kept, minlength=self.num_experts)
        dropped = (routing.topk_ids >= self.num_experts).sum()
        assert balance.counts.dtype == torch.int64
        assert (balance.counts >= computed).all()
        assert balance.dropped.item() == dropped.item()
        assert balance.counts.sum() <= computed.sum() + dropped
        assert tuple(balance.prob_sum.shape) == (self.num_experts,)
        assert relative_error(balance.prob_sum.sum(), torch.tensor(50.0)) < 1e-9
        assert balance.prob_sum.requires_grad
        assert balance.z_sum.requires_grad

    def test_padding_takes_part_in_nothing(self) -> None:
        """Padding is dropped; other tokens and the Balance are as if it were not there.

        A router whose forward method has no argument `padding` is skipped.
        """
        self._check_padding(self.rule)

    def test_forward_changes_no_state(self) -> None:
        """Only `update` changes the router. It takes counts [E], and keeps the kinds of buffers."""
        router = self._router(self.rule, torch.float32)
        before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
        router(self._tokens(30, torch.float32))
        assert all(torch.equal(before[name], t) for name, t in router.state_dict().items())
        kinds = {name: (b.shape, b.dtype) for name, b in router.named_buffers()}
        router.update(torch.arange(self.num_experts, device=self.run_device()))
        assert {name: (b.shape, b.dtype) for name, b in router.named_buffers()} == kinds

    def test_autocast_routes_like_low_precision(self) -> None:
        """Under autocast, float32 operands route bit by bit as the same operands cast beforehand.

        If this fails, logits are computed from float32 operands, or by an operator that autocast
        casts a second time.
        """
        router = self._router(self.rule, torch.float32)
        x = self._tokens(33, torch.float32).detach()
        torch.manual_seed(0)  # an algorithm may be random in training
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            cast = router(x)
        router.weight.data = router.weight.data.to(torch.bfloat16)
        torch.manual_seed(0)
        plain = router(x.to(torch.bfloat16))
        for a, b in zip(cast, plain):
            assert torch.equal(a, b)

    def test_compiles_whole(self) -> None:
        """``torch.compile(fullgraph=True)`` gives the same.

        If this fails, forward branches on a tensor's values or calls something that Dynamo cannot
        trace; register it as an operator.
        """
        self._check_compiled(self.rule)

    def _check_replay(self, rule: RoutingRule) -> None:
        router = self._router(rule, torch.float32)
        x = self._tokens(20, torch.float32)
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

    def _check_padding(self, rule: RoutingRule) -> None:
        router = self._router(rule, torch.float64).eval()
        if "padding" not in signature(router.forward).parameters:
            pytest.skip(f"{self.backend}: forward has no argument padding")
        x = self._tokens(50, torch.float64)
        padding = torch.arange(50, device=x.device) % 3 == 1
        routing = router(x, padding=padding)
        alone = router(x[~padding])
        assert (routing.topk_ids[padding] == self.num_experts).all()
        assert not routing.topk_weights[padding].any()
        assert torch.equal(routing.topk_ids[~padding], alone.topk_ids)
        assert relative_error(routing.topk_weights[~padding], alone.topk_weights) < 1e-12
        got = router.balance(routing, padding)
        want = router.balance(alone)
        assert torch.equal(got.counts, want.counts)
        assert torch.equal(got.dropped, want.dropped)
        assert relative_error(got.prob_sum, want.prob_sum) < 1e-12
        assert relative_error(got.z_sum, want.z_sum) < 1e-12

    def _check_compiled(self, rule: RoutingRule) -> None:
        torch.compiler.reset()
        router = self._router(rule, torch.float32)
        x = self._tokens(30, torch.float32)
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)  # an algorithm may be random in training
        want = router(x)
        torch.manual_seed(0)
        got = compiled(x)
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
