"""A third-party plugin, installed with pip, is selectable by config and environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from tokenyard import MoE, Workload, default_registry

PROJECT = Path(__file__).parents[1] / "example_plugin"


@pytest.fixture
def installed(example_plugin, monkeypatch):
    """Make the example plugin visible in this process, to a new registry."""
    monkeypatch.syspath_prepend(example_plugin["PYTHONPATH"])
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


def choose(backends: dict | None) -> str:
    moe = MoE(Workload(8, 8, 4, 2), backends=backends)
    return f"{moe.chosen['experts'].backend.name} {type(moe.experts.kernel).__module__}"


def test_config_selects_it(installed):
    assert choose({"experts": {"name": "acme", "chunk": 2}}) == "acme acme_experts.kernel"


def test_environment_selects_it(installed, monkeypatch):
    monkeypatch.setenv("TOKENYARD_EXPERTS", "acme")
    assert choose(None) == "acme acme_experts.kernel"


def test_auto_does_not_select_it(installed):
    assert choose(None) == "cpu tokenyard.experts._cpu"


def test_the_table_shows_it(example_plugin):
    """In a new process."""
    table = subprocess.run(
        [sys.executable, "-m", "tokenyard"],
        env=example_plugin,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    ).stdout
    assert ["experts", "acme", "acme-experts", "1.0"] in [
        line.split()[:4] for line in table.splitlines()
    ]


def test_its_own_tests_pass_the_kit(example_plugin, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PROJECT / "tests")],
        env=example_plugin,
        cwd=tmp_path,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " failed" not in run.stdout
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) > 80
