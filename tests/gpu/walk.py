"""Run commands in their own processes, and compare tensors on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
SHORT = ("max_duration=12ba", "save_interval=4ba", "eval_interval=6ba", "eval_subset_num_batches=1")
"""Overrides: the quickstart takes 12 steps and saves three times."""


class Walk:
    """The working folder and the device of commands that run one after another."""

    def __init__(self, folder: Path, device: str):
        self.folder = folder
        self.device = device

    def __call__(self, *command: object, code: int = 0) -> str:
        """Run ``tokenyard``, require an exit code and no traceback; return stdout and stderr."""
        result = subprocess.run(
            self._command(command),
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        output = result.stdout + result.stderr
        assert "Traceback" not in output, output
        assert result.returncode == code, output
        return output

    def train(self, name: str, *overrides: str, config: Path = QUICKSTART, **options: int) -> Path:
        """Train for 12 steps into the folder `name`; return its path."""
        self("train", config, *SHORT, *self.settings(name), *overrides, **options)
        return self.folder / name

    def settings(self, name: str) -> tuple[str, ...]:
        """Return the overrides for the name, the folder and the device of a run."""
        return f"run_name={name}", f"save_folder={name}", f"device={self.device}"

    def interrupted(self, *command: object, after: int, number: int) -> tuple[int, str]:
        """Start a command and send it a signal after so many steps; return code and output.

        The last argument of `command` is the name of the run. It is not passed on.
        """
        metrics = self.folder / str(command[-1]) / "metrics.jsonl"
        process = subprocess.Popen(
            self._command(command[:-1]),
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 120
        while steps(metrics) < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def _command(self, command: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "tokenyard_train", *map(str, command)]


def steps(metrics: Path) -> int:
    """Count the training steps in a metrics file; a missing file has none."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["kind"] == "train" for line in lines if line.endswith("}"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint or Hugging Face folder."""
    by_name = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            by_name |= {name: file.get_tensor(name) for name in names}
    return by_name


def differing(first: Path, second: Path) -> list[str]:
    """Return the names of the tensors that are not bit-identical in two checkpoints."""
    a = tensors(first)
    b = tensors(second)
    assert a, first
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def _environment() -> dict[str, str]:
    """Return the environment of a user, without the settings of these tests."""
    excluded = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in excluded}
    return environment | {"COLUMNS": "120"}


KILL = signal.SIGKILL
