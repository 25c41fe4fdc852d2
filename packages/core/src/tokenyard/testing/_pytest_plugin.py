"""Loaded by pytest in every project that has tokenyard installed: it must import nothing heavy at the top."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Have asserts in the kit explained like a test's own."""
    config.addinivalue_line("markers", "gpu: needs one CUDA GPU")


pytest.register_assert_rewrite(
    "tokenyard.testing._base",
    "tokenyard.testing._compare",
    "tokenyard.testing._exchange",
    "tokenyard.testing._experts",
    "tokenyard.testing._model",
    "tokenyard.testing._permutation",
    "tokenyard.testing._router",
    "tokenyard.testing._strategy",
)
