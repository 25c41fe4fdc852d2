"""Settings, skips and fixtures of all tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads this when a kernel is defined. Kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# With several threads each, xdist workers and their subprocesses would compete for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A separate project. tests/core/test_example_plugin.py installs and runs it.
collect_ignore = ["example_plugin"]

_GPUS = {"gpu": 1, "multigpu": 2}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run each file on one xdist worker, so that its fixtures are built once.

    All tests with several ranks run on the same worker, because they share their processes.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/parallel/") or "over_two" in nodeid:
                return "ranks"
            scope: str = super()._split_scope(nodeid)
            return scope

    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` or `multigpu` if there are too few GPUs."""
    for mark, needed in _GPUS.items():
        if item.get_closest_marker(mark) is None:
            continue
        count = torch.cuda.device_count()
        if count < needed:
            gpus = f"{needed} CUDA GPU{'s' if needed > 1 else ''}"
            pytest.skip(f"{mark}: needs {gpus}, and torch finds {count}")


@pytest.fixture(scope="session")
def example_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install the example plugin into a folder; return an environment that imports it."""
    target = tmp_path_factory.mktemp("site")
    project = Path(__file__).parent / "example_plugin"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(target))
    command = [sys.executable, "-m", "pip", "install", *options, str(project)]
    subprocess.run(command, check=True, timeout=120)
    return os.environ | {"PYTHONPATH": str(target)}
