"""Import path and fixtures of these tests: the emulator and a temporary cache."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def compiled_kernels():
    """Skip if no C++ compiler is installed."""
    import emulated

    if emulated.COMPILER is None:
        pytest.skip("emulating CUDA needs the C++ compiler g++")


@pytest.fixture
def emulation(compiled_kernels, monkeypatch):
    """Run kernels on the CPU emulator."""
    import emulated

    monkeypatch.setattr("tokenyard_kernels_cuda.toolchain._driver.launch", emulated.launch)


@pytest.fixture
def cubins(tmp_path, monkeypatch):
    """Cache cubins in a temporary folder; return it."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"
