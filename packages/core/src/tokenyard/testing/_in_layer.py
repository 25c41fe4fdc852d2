"""Standard tests of routers, permutations and expert kernels inside an MoE layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tokenyard.backend import Kind
from tokenyard.errors import BackendError
from tokenyard.moe import MoE
from tokenyard.registry import BackendChoice, Registry, Request, default_registry
from tokenyard.testing._base import Conformance
from tokenyard.workload import RoutingRule, Workload

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUM_EXPERTS = 4
_TOP_K = 2


class _OneKindRegistry(Registry):
    """The registry under test for one kind of backend, and the default registry for all others."""

    def __init__(self, registry: Registry, kind: Kind):
        super().__init__(())
        self._registry = registry
        self._kind = kind

    def choose(
        self, kind: Kind, request: Request = None, workload: Workload | None = None
    ) -> BackendChoice:
        """Choose a backend from the registry for its kind."""
        registry = self._registry if kind == self._kind else default_registry()
        return registry.choose(kind, request, workload)


class LayerPartConformance(Conformance):
    """Standard tests of every router, permutation and expert kernel inside ``tokenyard.MoE``."""

    rule: ClassVar[RoutingRule] = RoutingRule()  # the routing of the layer
    dim: ClassVar[int] = 32  # of the layer
    ffn_dim: ClassVar[int] = 48

    def test_other_dtype_is_refused(self) -> None:
        """A layer called in another dtype than its workload raises, and never calls the backend.

        If this fails, code between ``MoE`` and the backend casts x, or catches the error.
        """
        layer, workload = self._layer()
        other = next(dtype for dtype in _DTYPES if dtype != workload.dtype)
        x = torch.randn(5, workload.dim, dtype=other, device=workload.device)
        self._refused(layer, x, str(other).removeprefix("torch."))

    def test_other_device_is_refused(self) -> None:
        """A layer called on another device than its workload raises, and never calls the backend.

        If this fails, code between ``MoE`` and the backend moves x, or catches the error.
        """
        layer, workload = self._layer()
        if not torch.cuda.is_available():
            pytest.skip("needs a second device, and torch finds no CUDA GPU here")
        other = torch.device("cuda:0" if workload.device.type == "cpu" else "cpu")
        x = torch.randn(5, workload.dim, dtype=workload.dtype, device=other)
        self._refused(layer, x, str(other))

    def _layer(self) -> tuple[MoE, Workload]:
        """Return a layer with the backend under test, in the first dtype it supports."""
        reasons = []
        for dtype in _DTYPES:
            workload = Workload(
                self.dim,
                self.ffn_dim,
                _NUM_EXPERTS,
                _TOP_K,
                router=self.rule,
                dtype=dtype,
                device=self.run_device(),
            )
            reason = self.offered().unusable(workload)
            if reason is None:
                backends: dict[str, Any] = {self.kind: {"name": self.backend, **self.options}}
                registry = _OneKindRegistry(self.registry(), self.kind)
                return MoE(workload, backends=backends, registry=registry, dtype=dtype), workload
            reasons.append(reason)
        return pytest.skip(f"{self.backend}: {reasons[0]}")

    def _refused(self, layer: MoE, x: torch.Tensor, message: str) -> None:
        def fail(*arguments: Any) -> Any:
            pytest.fail("the backend was called")

        layer.router.forward = fail  # type: ignore[attr-defined]
        layer.experts.permutation = SimpleNamespace(plan=fail)  # type: ignore[assignment]
        layer.experts.kernel = fail  # type: ignore[assignment]
        with pytest.raises(BackendError, match=message):
            layer(x)
