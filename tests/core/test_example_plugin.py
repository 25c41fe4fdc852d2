"""A third-party plugin, installed with pip, is selectable by config and environment."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "example_plugin"
PRINT_CHOICE = """
from tokenyard import MoE, Workload
moe = MoE(Workload(8, 8, 4, 2), backends={backends})
print(moe.chosen["experts"].backend.name, type(moe.experts.kernel).__module__)
"""


def choose(environment: dict[str, str], backends: dict | None) -> str:
    code = PRINT_CHOICE.format(backends=backends)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_config_selects_it(example_plugin):
    request = {"experts": {"name": "acme", "chunk": 2}}
    assert choose(example_plugin, request) == "acme acme_experts.kernel"


def test_environment_selects_it(example_plugin):
    environment = example_plugin | {"TOKENYARD_EXPERTS": "acme"}
    assert choose(environment, None) == "acme acme_experts.kernel"


def test_auto_does_not_select_it(example_plugin):
    assert choose(example_plugin, None) == "cpu tokenyard.experts._cpu"


def test_the_table_shows_it(example_plugin):
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
