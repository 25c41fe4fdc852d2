"""What every test shares."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined: they then run on the CPU

collect_ignore = ["example_plugin"]  # a project of its own; tests/core/test_example_plugin.py installs and runs it


_GPUS = {"gpu": 1, "multigpu": 2}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` or `multigpu` where there are fewer GPUs than it needs."""
    for mark, needed in _GPUS.items():
        if item.get_closest_marker(mark) is not None and (found := torch.cuda.device_count()) < needed:
            pytest.skip(f"{mark}: needs {needed} CUDA GPU{'s' if needed > 1 else ''}, and torch finds {found}")
