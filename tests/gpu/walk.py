"""What the walk shares: commands in processes of their own, and tensors on disk."""

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
"""Overrides under which the quickstart takes 12 steps and saves three times."""


class Walk:
    """A folder to work in, and the device that every command is given."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device

    def __call__(self, *command: object, code: int = 0) -> str:
        """Run ``tokenyard`` as a user would; return what it printed. A traceback is never right."""
        done = subprocess.run(
            self._command(command),
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        assert done.returncode == code, said
        return said

    def train(self, name: str, *overrides: str, config: Path = QUICKSTART, **options: int) -> Path:
        """Train for 12 steps into a folder of that name; return the folder."""
        self("train", config, *SHORT, *self.settings(name), *overrides, **options)
        return self.folder / name

    def settings(self, name: str) -> tuple[str, ...]:
        """Return the overrides that name a run, its folder and its device."""
        return f"run_name={name}", f"save_folder={name}", f"device={self.device}"

    def interrupted(self, *command: object, after: int, number: int) -> tuple[int, str]:
        """Start a command, and signal it `after` steps of the run; return code and output."""
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
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def _command(self, command: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "tokenyard_train", *map(str, command)]


def steps(metrics: Path) -> int:
    """Count the training steps that a run has written down."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["kind"] == "train" for line in lines if line.endswith("}"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint or Hugging Face folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of tensors that are not bit for bit the same in two checkpoints."""
    a, b = tensors(one), tensors(other)
    assert a, one
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def _environment() -> dict[str, str]:
    """Return the environment of a command: of a user, not of these tests."""
    left_out = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTEST_XDIST_WORKER")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {
        "COLUMNS": "120"
    }


KILL = signal.SIGKILL
