"""The research plugin of examples/pruned passes the kit, trains, and resumes bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "examples" / "pruned"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Install the plugin into a folder; return an environment that imports it."""
    target = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(target))
    command = [sys.executable, "-m", "pip", "install", *options, str(PROJECT)]
    subprocess.run(command, check=True, timeout=120)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(target)}


def run(environment, folder, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        cwd=folder,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_its_own_tests_pass(environment, tmp_path):
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(tmp_path))
    assert " passed" in run(environment, tmp_path, "pytest", *options, str(PROJECT / "tests"))


def test_it_trains_checkpoints_and_resumes(environment, tmp_path):
    """A resumed run has the losses of one that was not stopped."""
    options = (
        "model.hidden_size=128",
        "model.intermediate_size=256",
        "max_seq_len=32",
        "global_train_batch_size=4",
        "eval_interval=100ba",
        "save_interval=3ba",
        "device=cpu",
        "scheduler.name=constant_with_warmup",
        "scheduler.t_warmup=2ba",
    )
    train = ("tokenyard_train", "train", str(PROJECT / "config.yaml"), *options)
    run(environment, tmp_path, *train, "save_folder=whole", "max_duration=6ba")
    run(environment, tmp_path, *train, "save_folder=parts", "max_duration=3ba")
    output = run(environment, tmp_path, *train, "save_folder=parts", "max_duration=6ba")
    assert "resumed after batch 3" in output
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == whole
    assert len(whole) == 6
    assert whole[-1] < whole[0]
