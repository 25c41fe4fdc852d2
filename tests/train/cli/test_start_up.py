"""Commands import only what they need, to keep the start-up short."""

import subprocess
import sys

import yaml

HEAVY = (
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
)


def imported(code: str, *arguments: str) -> set[str]:
    """Run some code in a process; return which watched modules it imports besides torch's.

    Torch 2.13 itself imports sympy and DTensor.
    """
    watched = (*HEAVY, "matplotlib", "transformers")
    program = f"""
import sys, torch
before = set(sys.modules)
{code}
print()
print(*(name for name in {watched!r} if name in sys.modules and name not in before))
"""
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_neither_check_nor_a_step_imports_anything_heavy(settings, tmp_path):
    """Not `tokenyard backends` either. A step needs no compiler and no checkpoint."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | {"eval_loader": None, "max_duration": "2ba"}))
    code = """
import tokenyard_cli
path = sys.argv[1]
for arguments in (["backends"], ["check", path]):
    sys.argv[1:] = arguments
    try:
        tokenyard_cli.main()
    except SystemExit as ended:
        assert not ended.code

from rich.console import Console
from tokenyard_train.engine.setup import build_setup
from tokenyard_train.config import load_config
from tokenyard_train.commands.train import train
from tokenyard_train.engine.step import train_step
setup = build_setup(load_config(path), Console(quiet=True))
train_step(setup, 0)
train_step(setup, 1)
"""
    assert imported(code, str(path)) == set()
