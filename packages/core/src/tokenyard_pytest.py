"""The pytest plugin of tokenyard-core, which pytest loads in every project.

It is outside the package `tokenyard`, so that loading it does not import torch.
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker `gpu`."""
    config.addinivalue_line("markers", "gpu: needs one CUDA GPU")


# a failing assert in the kit shows its values, as in a test
pytest.register_assert_rewrite("tokenyard.testing")
