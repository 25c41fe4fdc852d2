"""What every test shares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before any kernel is defined: they then run on the CPU

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers, and what they start, would wait for each other's threads
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore = [
    "example_plugin"
]  # a project of its own; tests/core/test_example_plugin.py installs and runs it


_GPUS = {"gpu": 1, "multigpu": 2}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker of pytest-xdist have all tests of several processes, which they share."""
    for item in items:
        if "parallel" in item.path.parts or "over_two" in item.name:
            item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` or `multigpu` where there are fewer GPUs than it needs."""
    for mark, needed in _GPUS.items():
        if (
            item.get_closest_marker(mark) is not None
            and (found := torch.cuda.device_count()) < needed
        ):
            pytest.skip(
                f"{mark}: needs {needed} CUDA GPU{'s' if needed > 1 else ''}, and torch finds {found}"
            )


@pytest.fixture(scope="session")
def example_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the example plugin into a folder; return an environment that finds it there."""
    target = tmp_path_factory.mktemp("site")
    project = Path(__file__).parent / "example_plugin"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(target))
    command = [sys.executable, "-m", "pip", "install", *options, str(project)]
    subprocess.run(command, check=True, timeout=120)
    return os.environ | {"PYTHONPATH": str(target)}
