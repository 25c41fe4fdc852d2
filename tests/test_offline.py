"""The bundle for a machine without a network has all requirements and runs without downloads."""

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


def test_the_bundle_has_all_requirements_except_those_of_torch(bundle):
    excluded = bundle.PREINSTALLED | {"tokenyard-train", "tokenyard-core"}
    versions = bundle.needs(["tokenyard-train"], excluded, "3.12")
    assert {"pydantic", "pydantic-core", "omegaconf", "pyyaml", "rich"} <= set(versions)
    assert {"markdown-it-py", "tokenyard-models"} <= set(versions)
    assert not {"torch", "sympy", "networkx", "tokenyard-core"} & set(versions)


def test_a_missing_distribution_is_named(bundle):
    sentence = "error: no-such-thing is not installed here, and the bundle needs it"
    with pytest.raises(SystemExit, match=sentence):
        bundle.needs(["no-such-thing"], frozenset(), "3.12")


@pytest.mark.full
def test_the_bundle_runs_without_a_network(tmp_path):
    """Build the bundle, install it with --no-index, and run tests and a benchmark from it."""
    out = tmp_path / "offline"
    results = tmp_path / "results"
    plotting = ("matplotlib", "numpy", "pillow", "contourpy", "fonttools", "kiwisolver")
    present = (*plotting, "safetensors", "hypothesis")
    bundle = [sys.executable, TOOLS / "bundle.py", "--out", out, "--without", *present]
    subprocess.run(bundle, check=True)
    bench = "--shape 64,16,16,4,2 --dtype fp32 --peers none --repetitions 3"
    options = ["--out", results, "--tests", "-k test_losses", "--bench", bench]
    result = subprocess.run(
        [sys.executable, out / "run.py", *options],
        env={"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "passed" in result.stdout
    assert "64,16,16,4,2 fp32 natural cpu" in result.stdout
    assert (results / "layer.png").exists()
