"""A third party's plugin, installed for real from its own project: chosen by config and environment, and proven."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1] / "example_plugin"
ASK = """
from tokenyard import MoE, Workload
moe = MoE(Workload(8, 8, 4, 2), backends={backends})
print(moe.chosen["experts"].backend.name, type(moe.experts.kernel).__module__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Install the plugin into a folder of its own; return an environment whose imports find it there."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
    ]
    subprocess.run([*pip, str(target), str(PROJECT)], check=True, timeout=120)
    return os.environ | {"PYTHONPATH": str(target)}


def ask(environment: dict[str, str], backends: dict | None) -> str:
    code = ASK.format(backends=backends)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_config_selects_it(installed):
    request = {"experts": {"name": "acme", "chunk": 2}}
    assert ask(installed, request) == "acme acme_experts.kernel"


def test_environment_selects_it(installed):
    assert ask(installed | {"TOKENYARD_EXPERTS": "acme"}, None) == "acme acme_experts.kernel"


def test_auto_leaves_it_to_those_who_ask(installed):
    assert ask(installed, None) == "cpu tokenyard.experts._cpu"


def test_the_table_shows_it(installed):
    table = subprocess.run(
        [sys.executable, "-m", "tokenyard"],
        env=installed,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    ).stdout
    assert ["experts", "acme", "acme-experts", "1.0"] in [
        line.split()[:4] for line in table.splitlines()
    ]


def test_its_own_tests_pass_the_kit(installed, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PROJECT / "tests")],
        env=installed,
        cwd=tmp_path,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " failed" not in run.stdout
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) > 80
