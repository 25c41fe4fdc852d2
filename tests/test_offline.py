"""The bundle for a machine without a network: what it carries, and that it runs with nothing fetched."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools" / "offline"


@pytest.fixture
def bundle():
    spec = importlib.util.spec_from_file_location("bundle", TOOLS / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_needed_is_carried_but_what_torch_brings(bundle):
    found = bundle.needs(
        ["tokenyard-train"], bundle.THEIRS | {"tokenyard-train", "tokenyard-core"}, "3.12"
    )
    assert {
        "pydantic",
        "pydantic-core",
        "omegaconf",
        "pyyaml",
        "rich",
        "markdown-it-py",
        "tokenyard-models",
    } <= set(found)
    assert not {"torch", "sympy", "networkx", "tokenyard-core"} & set(found)


def test_what_is_not_installed_is_named(bundle):
    with pytest.raises(
        SystemExit, match=r"error: no-such-thing is not installed here, and the bundle needs it"
    ):
        bundle.needs(["no-such-thing"], frozenset(), "3.12")


@pytest.mark.full
def test_the_bundle_runs_without_a_network(tmp_path):
    """Wheels are built, carried, installed with --no-index, and tests and a benchmark run from them."""
    out, results = tmp_path / "offline", tmp_path / "results"
    present = (
        "matplotlib",
        "numpy",
        "pillow",
        "contourpy",
        "fonttools",
        "kiwisolver",
        "safetensors",
        "hypothesis",
    )
    subprocess.run(
        [sys.executable, TOOLS / "bundle.py", "--out", out, "--without", *present], check=True
    )
    ran = subprocess.run(
        [
            *(sys.executable, out / "run.py", "--out", results, "--tests", "-k test_losses"),
            *("--bench", "--shape 64,16,16,4,2 --dtype fp32 --peers none --repetitions 3"),
        ],
        env={"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "passed" in ran.stdout
    assert "64,16,16,4,2 fp32 natural cpu" in ran.stdout
    assert (results / "layer.png").exists()
