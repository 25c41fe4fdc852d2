"""The base class of all conformance classes."""

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
    """Base class of the standard tests for one kind of backend."""

    kind: ClassVar[Kind]
    backend: ClassVar[str]  # name of the backend under test
    options: ClassVar[Mapping[str, Any]] = {}  # options of its constructor
    device: ClassVar[str] = "auto"  # a GPU if torch finds one

    def registry(self) -> Registry:
        """Return the registry that offers the backend. Override it for an uninstalled backend."""
        return default_registry()

    def offered(self) -> Backend:
        """Return the backend under test. Environment variables do not override it."""
        for offer in self.registry().offers(self.kind):
            if offer.backend.name == self.backend:
                return offer.backend
        try:
            self.registry().choose(self.kind, self.backend)
        except BackendError as error:
            pytest.fail(str(error))
        return pytest.fail(f"{self.kind} backend {self.backend!r} is not offered")

    def run_device(self) -> torch.device:
        """Return the device of all tests."""
        return resolve_device(self.device)

    def construct(self, *args: Any, workload: Workload | None = None, **kwargs: Any) -> Any:
        """Construct the backend, or skip the test with its reason if it is unusable."""
        offer = self.offered()
        reason = offer.unusable(workload) if workload is not None else None
        if reason is not None:
            pytest.skip(f"{self.backend}: {reason}")
        return offer.load()(*args, **self.options, **kwargs)

    def test_no_standard_test_is_overridden(self) -> None:
        """A standard test is only overridden by a test marked ``xfail(reason=...)``.

        If this fails, a method of your class has the name of a standard test.
        """
        standard = next(
            cls for cls in type(self).__mro__ if cls.__module__.startswith("tokenyard.testing.")
        )
        for name in (n for n in dir(standard) if n.startswith("test_")):
            override = getattr(type(self), name, None)
            if override is getattr(standard, name):
                continue
            marks = getattr(override, "pytestmark", [])
            excused = any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
            assert excused, (
                f"{name} is a standard test; "
                "mark it xfail(reason=...) if the backend cannot pass it"
            )
