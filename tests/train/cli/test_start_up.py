"""What a command imports: nothing that it does not need, since a second of start-up is a second of every try."""

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
    """The modules of HEAVY, and matplotlib and transformers, that a process has imported after some code."""
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
    """What torch imports itself, in this version: 2.13 has sympy and DTensor in it."""
    return imported("import torch")


def test_the_commands_that_only_look(written, with_torch):
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
