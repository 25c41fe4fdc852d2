"""Loaded by pytest in every project that has tokenyard-core installed, outside `tokenyard` so that torch stays out."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that need a GPU."""
    config.addinivalue_line("markers", "gpu: needs one CUDA GPU")


pytest.register_assert_rewrite(  # so that a failing assert in the kit is explained like a test's own
    "tokenyard.testing._base",
    "tokenyard.testing._compare",
    "tokenyard.testing._exchange",
    "tokenyard.testing._experts",
    "tokenyard.testing._model",
    "tokenyard.testing._permutation",
    "tokenyard.testing._router",
    "tokenyard.testing._strategy",
)
