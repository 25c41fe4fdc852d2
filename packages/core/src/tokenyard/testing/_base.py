"""What every conformance class shares: constructing the backend under test, skipping politely, guarding the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from tokenyard.backend import Backend, Kind
from tokenyard.devices import resolve_device
from tokenyard.errors import BackendError
from tokenyard.registry import Registry, default_registry
from tokenyard.workload import Workload


class Conformance:
    """Base of the standard tests of one kind of backend."""

    kind: ClassVar[Kind]
    backend: ClassVar[str]  # the name under test
    options: ClassVar[Mapping[str, Any]] = {}  # for its constructor
    device: ClassVar[str] = "auto"  # cuda where there is one

    def registry(self) -> Registry:
        """Return the registry that offers the backend; override it to test one that is not installed."""
        return default_registry()

    def offered(self) -> Backend:
        """Return the offer under test; the environment does not override it."""
        for offer in self.registry().offers(self.kind):
            if offer.backend.name == self.backend:
                return offer.backend
        try:
            self.registry().choose(self.kind, self.backend)
        except BackendError as error:
            pytest.fail(str(error))
        return pytest.fail(f"{self.kind} backend {self.backend!r} is not offered")

    def run_device(self) -> torch.device:
        """Return the device that the tests run on."""
        return resolve_device(self.device)

    def construct(self, *args: Any, workload: Workload | None = None, **kwargs: Any) -> Any:
        """Construct the backend, or skip with its own sentence if it is unusable for the workload."""
        offer = self.offered()
        reason = offer.unusable(workload) if workload is not None else None
        if reason is not None:
            pytest.skip(f"{self.backend}: {reason}")
        return offer.load()(*args, **self.options, **kwargs)

    def test_standard_tests_stand(self) -> None:
        """A standard test may be overridden only by one marked xfail with a reason."""
        standard = next(
            cls for cls in type(self).__mro__ if cls.__module__.startswith("tokenyard.testing.")
        )
        for name in (n for n in dir(standard) if n.startswith("test_")):
            mine = getattr(type(self), name, None)
            if mine is getattr(standard, name):
                continue
            marks = getattr(mine, "pytestmark", [])
            excused = any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
            assert excused, (
                f"{name} is a standard test; mark it xfail(reason=...) if the backend cannot pass it"
            )
