"""Standard tests of the parts of an MoE layer that are about the layer's own checks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tokenyard.backend import Kind
from tokenyard.errors import BackendError
from tokenyard.moe import MoE
from tokenyard.registry import Chosen, Registry, Request, default_registry
from tokenyard.testing._base import Conformance
from tokenyard.workload import RoutingRule, Workload

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_D, _F, _E, _K = 32, 48, 4, 2


class _WithTheRest(Registry):
    """The registry under test for its own kind, and the installed backends for all others."""

    def __init__(self, own: Registry, kind: Kind):
        super().__init__(())
        self._own, self._kind = own, kind

    def choose(
        self, kind: Kind, request: Request = None, workload: Workload | None = None
    ) -> Chosen:
        """Choose from the registry of that kind."""
        registry = self._own if kind == self._kind else default_registry()
        return registry.choose(kind, request, workload)


class LayerPartConformance(Conformance):
    """What holds for every router, permutation and expert kernel inside ``tokenyard.MoE``."""

    rule: ClassVar[RoutingRule] = RoutingRule()  # the routing of the layer

    def test_other_dtype_is_refused(self) -> None:
        """A layer called in another dtype than its workload's raises one sentence and never reaches the backend.

        If this test fails, something between ``MoE`` and the backend casts or catches what it should not.
        """
        layer, workload = self._layer()
        other = next(dtype for dtype in _DTYPES if dtype != workload.dtype)
        self._refused(
            layer, torch.randn(5, workload.dim, dtype=other, device=workload.device), str(other)[6:]
        )

    def test_other_device_is_refused(self) -> None:
        """A layer called on another device than its workload's raises one sentence."""
        layer, workload = self._layer()
        if not torch.cuda.is_available():
            pytest.skip("needs a second device, and torch finds no CUDA GPU here")
        other = torch.device("cuda:0" if workload.device.type == "cpu" else "cpu")
        self._refused(
            layer, torch.randn(5, workload.dim, dtype=workload.dtype, device=other), str(other)
        )

    def _layer(self) -> tuple[MoE, Workload]:
        """Return a layer with the backend under test, in the first dtype that it supports."""
        reasons = []
        for dtype in _DTYPES:
            workload = Workload(
                _D, _F, _E, _K, router=self.rule, dtype=dtype, device=self.run_device()
            )
            reason = self.offered().unusable(workload)
            if reason is None:
                chosen: dict[str, Any] = {self.kind: {"name": self.backend, **self.options}}
                registry = _WithTheRest(self.registry(), self.kind)
                return MoE(workload, backends=chosen, registry=registry, dtype=dtype), workload
            reasons.append(reason)
        return pytest.skip(f"{self.backend}: {reasons[0]}")

    def _refused(self, layer: MoE, x: torch.Tensor, named: str) -> None:
        def reached(*arguments: Any) -> Any:
            pytest.fail("the backend was called")

        layer.router.forward = reached
        layer.experts.permutation = SimpleNamespace(plan=reached)  # type: ignore[assignment]
        layer.experts.kernel = reached  # type: ignore[assignment]
        with pytest.raises(BackendError, match=named):
            layer(x)
