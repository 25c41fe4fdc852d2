"""Lets tests import the modules beside them, and gives them the emulator."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def compiled_kernels():
    """Skip where there is nothing to emulate with."""
    import emulated

    if emulated.COMPILER is None:
        pytest.skip("emulating CUDA needs the C++ compiler g++")


@pytest.fixture
def emulation(compiled_kernels, monkeypatch):
    """Run kernels on the CPU."""
    import emulated

    monkeypatch.setattr("tokenyard_kernels_cuda.toolchain._driver.launch", emulated.launch)


@pytest.fixture
def cubins(tmp_path, monkeypatch):
    """Keep what is compiled in a folder of the test's own; return that."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"
