"""`tokenyard launch`: processes that are killed, hang or are asked to stop, and a run that ends as if undisturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from test_training import settings  # noqa: F401 (a fixture)

BATCHES = 15


@pytest.fixture
def start(settings, tmp_path):  # noqa: F811
    """Start a supervisor of two processes for a run of that name; more settings replace those of the file."""

    def started(name, *options, **changes):
        parallel = {"strategy": {"name": "fsdp", "timeout": 40}, "expert_parallel": 2}
        length = {"max_duration": f"{BATCHES}ba", "save_interval": "3ba", "eval_interval": "10ba"}
        run = {"parallel": parallel, "save_folder": str(tmp_path / name), "save_num_checkpoints_to_keep": 3}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | length | run | changes))
        command = [sys.executable, "-m", "tokenyard_train", "launch", "--nproc", "2", *options, str(path)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)

    return started


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def steps(folder) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def state(folder):
    """Return the losses of every step, and all tensors of the last checkpoint, by name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["batch"]: line["loss"] for line in lines if line["kind"] == "train"}
    shards = [load_file(path) for path in sorted((folder / f"ba{BATCHES}").glob("*.safetensors"))]
    return losses, [{name: tensor.tolist() for name, tensor in shard.items()} for shard in shards]


KILLS = [(1, signal.SIGKILL, 4)]
FAULTS = [*KILLS, (0, signal.SIGSTOP, 8), (0, signal.SIGKILL, 12)]


@pytest.mark.parametrize("faults", [KILLS, pytest.param(FAULTS, marks=pytest.mark.full)], ids=["a kill", "and a hang"])
def test_killed_and_hanging_processes_are_started_again(start, tmp_path, faults):
    """At moments of their own; the run ends bit-identical to one that saw nothing of it."""
    whole = start("undisturbed")
    assert whole.wait(timeout=200) == 0, whole.stderr.read()
    process, folder = start("disturbed"), tmp_path / "disturbed"
    for rank, number, at in faults:
        wait_for(lambda at=at: steps(folder) >= at, process)
        victim = children(process)[rank]
        os.kill(victim, number)
        wait_for(lambda victim=victim: victim not in children(process), process)
    code, said = process.wait(timeout=200), process.stderr.read()
    assert code == 0, said
    assert "process 1 ended by signal SIGKILL; restarts left: 2" in said
    assert said.count("restarts left") == len(faults)
    assert state(folder) == state(tmp_path / "undisturbed")


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(start, tmp_path):
    """SIGTERM ends it with code 75, whatever the batch; what follows is what would have followed."""
    process, folder = start("stopped"), tmp_path / "stopped"
    wait_for(lambda: steps(folder) >= 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    said = process.stderr.read()
    assert "stopped as asked, after batch" in said
    done = steps(folder)
    assert 5 <= done < BATCHES
    assert (folder / f"ba{done}" / "manifest.json").exists()
    assert start("stopped", autoresume=True).wait(timeout=200) == 0
    assert steps(folder) == BATCHES


def test_a_mistake_is_said_once_and_not_tried_again(start):
    process = start("mistaken", parallel={"strategy": "single"})
    assert process.wait(timeout=100) == 2
    said = process.stderr.read()
    assert "parallel.strategy is 'single', which is for one process, and 2 were started; give fsdp or ddp" in said
    assert "restarts left" not in said
