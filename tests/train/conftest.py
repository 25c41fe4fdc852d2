import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tokenyard_cli
from tokenyard_train.commands.train import train
from tokenyard_train.config import TrainConfig, read_config
from tokenyard_train.engine.setup import Setup, build_setup

MODEL = {
    "name": "dbrx",
    "size": "tiny",
    "d_model": 16,
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
}


def write_text(folder: Path) -> Path:
    """Write 240 lines of predictable text into a new folder; return the folder."""
    folder.mkdir()
    for name, step in (("a.txt", 3), ("b.txt", 7)):
        lines = (
            f"{i} times {step} is {i * step}, and one more is {i * step + 1}.\n" for i in range(120)
        )
        (folder / name).write_text("".join(lines))
    return folder


def small_settings(text: Path, run: Path) -> dict[str, Any]:
    """Return a small training config as a mapping, for a run in the folder `run`."""
    return {
        "max_seq_len": 24,
        "model": MODEL,
        "train_loader": {"name": "text", "dataset": {"path": str(text)}},
        "eval_loader": {"name": "text", "dataset": {"path": str(text / "b.txt")}},
        "optimizer": {"name": "decoupled_adamw", "lr": 0.01, "weight_decay": 0.001},
        "max_duration": "6ba",
        "global_train_batch_size": 4,
        "device_eval_batch_size": 64,
        "save_folder": str(run),
        "device": "cpu",
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the process of `killed_run` does, so that results are equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def drawn() -> None:
    """Draw the pictures of a run, for tests that need them."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no pictures at the end of a run: they take longer than its few steps."""
    if "drawn" not in request.fixturenames:
        for name in ("loss_curve", "expert_heatmap"):
            monkeypatch.setattr(f"tokenyard_train.records.plots.{name}", lambda records, path: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with 240 lines of predictable text."""
    return write_text(tmp_path / "text")


@pytest.fixture
def settings(text: Path, tmp_path: Path) -> dict[str, Any]:
    """A small training config as a mapping."""
    return small_settings(text, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one batch in mixed precision; tests do not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = small_settings(write_text(folder / "text"), folder / "run")
    settings |= {"precision": "amp_bf16", "max_duration": "1ba"}
    return train(read_config(settings), Console(quiet=True)).folder


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
