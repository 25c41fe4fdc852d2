"""Commands import only what they need, to keep the start-up short."""

import subprocess
import sys

import pytest
import yaml

HEAVY = (
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
)


def imported(code: str, *arguments: str) -> set[str]:
    """Return which of the watched modules a process imports when it runs some code."""
    watched = (*HEAVY, "matplotlib", "transformers")
    report = f"print('\\n' + ' '.join(name for name in {watched!r} if name in sys.modules))"
    command = [sys.executable, "-c", f"import sys\n{code}\n{report}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def written(settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"eval_loader": None, "max_duration": "2ba"}))
    return str(path)


@pytest.fixture(scope="module")
def with_torch():
    """The modules that torch itself imports: torch 2.13 imports sympy and DTensor."""
    return imported("import torch")


def test_backends_and_check_import_nothing_heavy(written, with_torch):
    run = """
import tokenyard_cli
try:
    tokenyard_cli.main()
except SystemExit as ended:
    assert not ended.code
"""
    for name, arguments in (("backends", ()), ("check", (written,))):
        code = f"sys.argv = ['tokenyard', {name!r}, *sys.argv[1:]]{run}"
        assert imported(code, *arguments) == with_torch, name


def test_a_step_needs_no_compiler_and_no_checkpoint(written, with_torch):
    code = """
from rich.console import Console
from tokenyard_train.engine.setup import build_setup
from tokenyard_train.config import load_config
from tokenyard_train.commands.train import train
from tokenyard_train.engine.step import train_step
setup = build_setup(load_config(sys.argv[1]), Console(quiet=True))
train_step(setup, 0)
train_step(setup, 1)
"""
    assert imported(code, written) == with_torch
