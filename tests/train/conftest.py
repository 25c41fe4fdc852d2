import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tokenyard_cli
from tokenyard_train.config import TrainConfig, read_config
from tokenyard_train.engine.setup import Setup, build_setup

MODEL = {
    "name": "dbrx",
    "size": "tiny",
    "d_model": 16,
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with 240 lines of predictable text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, step in (("a.txt", 3), ("b.txt", 7)):
        lines = (
            f"{i} times {step} is {i * step}, and one more is {i * step + 1}.\n" for i in range(120)
        )
        (folder / name).write_text("".join(lines))
    return folder


@pytest.fixture
def settings(text: Path, tmp_path: Path) -> dict[str, Any]:
    """A small training config as a mapping."""
    return {
        "max_seq_len": 24,
        "model": MODEL,
        "train_loader": {"name": "text", "dataset": {"path": str(text)}},
        "eval_loader": {"name": "text", "dataset": {"path": str(text / "b.txt")}},
        "optimizer": {"name": "decoupled_adamw", "lr": 0.01, "weight_decay": 0.001},
        "max_duration": "6ba",
        "global_train_batch_size": 4,
        "save_folder": str(tmp_path / "run"),
        "device": "cpu",
    }


@pytest.fixture
def config(settings: dict[str, Any]) -> Callable[..., TrainConfig]:
    """Build a resolved config from `settings` with some keys replaced."""
    return lambda **changes: read_config(settings | changes)


@pytest.fixture
def console() -> Console:
    """A quiet console that records for `export_text`."""
    return Console(record=True, width=140, quiet=True)


@pytest.fixture
def build(config: Callable[..., TrainConfig], console: Console) -> Callable[..., Setup]:
    """Build the setup of a run from `settings` with some keys replaced."""
    return lambda **changes: build_setup(config(**changes), console)


@pytest.fixture
def tokenyard(monkeypatch, capsys):
    """Run the command in this process; return (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokenyard", *arguments])
        with pytest.raises(SystemExit) as ended:
            tokenyard_cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run
