"""`tokenyard launch`: processes that are killed, hang or are asked to stop, and a run that ends as if undisturbed."""

import json
import signal
from pathlib import Path

import pytest
from harness import layout_runs as runs
from harness.supervisor import Supervised, drawn
from safetensors.torch import load_file
from test_training import run

BATCHES, INTERVAL, TIMEOUT = 60, 5, 5
LAYOUTS = {2: "fsdp-2-ep2", 4: "hsdp-4-ep2"}
PARALLEL = {
    2: {"strategy": {"name": "fsdp", "timeout": TIMEOUT}, "expert_parallel": 2},
    4: {"strategy": {"name": "fsdp", "replicate": 2, "timeout": TIMEOUT}, "expert_parallel": 2},
}
LENGTH = {
    "max_duration": f"{BATCHES}ba",
    "save_interval": f"{INTERVAL}ba",
    "eval_interval": "20ba",
    "save_num_checkpoints_to_keep": 3,
}


@pytest.fixture
def start(settings, tmp_path):
    """Start a supervisor of some processes; more settings replace those of the file."""

    def started(name, nproc, *options, **changes):
        sizes = {
            "device_train_microbatch_size": 4 // nproc,
            "device_eval_batch_size": 2,
            "parallel": PARALLEL[nproc],
        }
        return Supervised(
            settings | LENGTH | sizes | {"save_folder": str(tmp_path / name)} | changes,
            nproc,
            *options,
        )

    return started


def left(folder: Path):
    """Return the losses of every step, and all tensors of the last checkpoint, by name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["batch"]: line["loss"] for line in lines if line["kind"] == "train"}
    shards = [load_file(path) for path in sorted((folder / f"ba{BATCHES}").glob("*.safetensors"))]
    return losses, [{name: tensor.tolist() for name, tensor in shard.items()} for shard in shards]


def survives(start, settings, tmp_path, nproc, disturbances, patience, **changes):
    """Disturb a run, and compare what it leaves with a run that saw nothing of it; return what each cost."""
    run(runs.trained, LAYOUTS[nproc], settings, tmp_path, **LENGTH)
    process = start("disturbed", nproc, "--max-restarts", str(len(disturbances)), **changes)
    outcomes = [process.disturb(each) for each in disturbances]
    assert process.process.wait(timeout=200) == 0, process.text()
    assert len(process.restarts) == len(disturbances), process.text()
    assert left(tmp_path / "disturbed") == left(tmp_path / LAYOUTS[nproc])
    for disturbance, outcome in zip(disturbances, outcomes):
        print(f"\n{nproc} ranks, {disturbance}: {outcome}")
        assert outcome.redone <= INTERVAL * (2 if changes.get("save_async") else 1)
        if disturbance.kind == "stop":
            assert outcome.detected <= TIMEOUT + patience
            assert f"process {disturbance.rank} hangs (it is stopped): process " in outcome.said, (
                process.text()
            )
            assert " waited in " in outcome.said
        else:
            assert f"process {disturbance.rank} ended by signal SIGKILL; restart " in outcome.said
    return outcomes


def test_processes_that_are_killed_or_hang_are_started_again(start, settings, tmp_path):
    """At random moments; the run ends bit-identical to one that saw nothing of it."""
    kinds = ["kill", "kill while saving", "stop"]
    survives(
        start, settings, tmp_path, 2, drawn(2, kinds, 2, BATCHES), patience=10
    )  # other tests run beside it


@pytest.mark.full
@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_many_faults(start, settings, tmp_path, nproc, seed):
    """Six kills and two hangs a run, some while a checkpoint is written; prints what each cost (-s)."""
    kinds = ["kill"] * 3 + ["kill while saving"] * 3 + ["stop"] * 2
    disturbances = drawn(10 * seed + nproc, kinds, nproc, BATCHES)
    survives(start, settings, tmp_path, nproc, disturbances, patience=2, save_async=seed % 2 == 1)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(start, settings, tmp_path):
    """SIGTERM ends it with code 75, whatever the batch; what follows is what would have followed."""
    first, folder = start("stopped", 2), tmp_path / "stopped"
    assert first.wait_for(lambda: first.steps() >= 7)
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in listeners(table, first.ranks().values())
    ]
    assert listening
    assert {address.partition(":")[0] for address in listening} == {"0100007F"}, (
        "they listen to the network"
    )
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(timeout=60) == 75
    assert first.text().count("stopped as asked, after batch") == 1
    done = first.steps()
    assert 7 <= done < BATCHES
    assert (folder / f"ba{done}" / "manifest.json").exists()
    rest = run(
        runs.trained,
        LAYOUTS[2],
        settings,
        tmp_path,
        save_folder=str(folder),
        autoresume=True,
        **LENGTH,
    )
    whole = run(
        runs.trained, LAYOUTS[2], settings, tmp_path, save_folder=str(tmp_path / "whole"), **LENGTH
    )
    assert rest.losses == whole.losses[done:]
    assert rest.digest == whole.digest


def listeners(table, pids):
    """Return the lines of /proc/net of the sockets that some processes listen at."""
    files = [
        file for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()
    ]
    inodes = {file.readlink().name for file in files}
    lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    return [
        line
        for line in lines
        if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in inodes
    ]
