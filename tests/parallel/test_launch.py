"""`tokenyard launch`: runs whose ranks are killed, hang or get a signal end undisturbed."""

import functools
import json
import signal
from pathlib import Path

import pytest
from harness import layout_runs as runs
from harness.layouts import run
from harness.supervisor import SupervisedRun, draw_faults
from safetensors.torch import load_file

BATCHES = 60
INTERVAL = 5  # steps between checkpoints
TIMEOUT = 5  # seconds of a collective
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
    "global_train_batch_size": 4,  # one microbatch: the steps need not be slow
}


@pytest.fixture
def launch(settings, tmp_path):
    """Start a supervised run; more settings override those of the file."""

    def start(name, nproc, *options, **changes):
        config = settings | LENGTH
        config |= {
            "device_train_microbatch_size": 4 // nproc,
            "device_eval_batch_size": 2,
            "parallel": PARALLEL[nproc],
            "save_folder": str(tmp_path / name),
        }
        return SupervisedRun(config | changes, nproc, *options)

    return start


@pytest.fixture(scope="module")
def undisturbed(small_config, tmp_path_factory):
    """Return the result and the folder of an undisturbed run over some ranks, trained once."""

    @functools.cache
    def train(nproc):
        folder = tmp_path_factory.mktemp("undisturbed")
        layout = LAYOUTS[nproc]
        return run(runs.trained, layout, small_config(), folder, **LENGTH), folder / layout

    return train


def final_state(folder: Path):
    """Return the loss of every step, and all tensors of the last checkpoint, by name."""
    return final_state_at(folder, BATCHES)


def final_state_at(folder: Path, batches: int):
    """Return the loss of every step, and all tensors of the checkpoint after some batches."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["batch"]: line["loss"] for line in lines if line["kind"] == "train"}
    shards = [load_file(path) for path in sorted((folder / f"ba{batches}").glob("*.safetensors"))]
    return losses, [{name: tensor.tolist() for name, tensor in shard.items()} for shard in shards]


def check_recovery(launched, faults, undisturbed, patience):
    """Inject faults, and compare the end of the run with that of an undisturbed run."""
    recoveries = [launched.inject(fault) for fault in faults]
    assert launched.process.wait(timeout=200) == 0, launched.text()
    assert len(launched.restarts) == len(faults), launched.text()
    _, expected_folder = undisturbed()
    assert final_state(launched.folder) == final_state(expected_folder)
    for fault, recovery in zip(faults, recoveries):
        print(f"\n{fault}: {recovery}")
        if fault.kind == "stop":
            assert recovery.detected <= TIMEOUT + patience
            reason = f"process {fault.rank} hangs (it is stopped): process "
            assert reason in recovery.message, launched.text()
            assert " waited in " in recovery.message
        else:
            reason = f"process {fault.rank} ended by signal SIGKILL; restart "
            assert reason in recovery.message
    return recoveries


def test_ranks_that_are_killed_or_hang_are_restarted(launch, undisturbed):
    """At random moments; the run ends bit-identical to an undisturbed one."""
    faults = draw_faults(2, ["kill", "kill while saving", "stop"], 2, BATCHES)
    launched = launch("disturbed", 2, "--max-restarts", str(len(faults)))
    # other tests run at the same time, so the supervisor may be slow
    recoveries = check_recovery(launched, faults, lambda: undisturbed(2), patience=10)
    assert all(recovery.redone <= INTERVAL for recovery in recoveries)


@pytest.mark.full
@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_many_faults(launch, undisturbed, nproc, seed):
    """Six kills and two hangs, some while a checkpoint is written; prints their costs (-s)."""
    kinds = ["kill"] * 3 + ["kill while saving"] * 3 + ["stop"] * 2
    faults = draw_faults(10 * seed + nproc, kinds, nproc, BATCHES)
    save_async = seed % 2 == 1
    options = ("--max-restarts", str(len(faults)))
    launched = launch("disturbed", nproc, *options, save_async=save_async)
    recoveries = check_recovery(launched, faults, lambda: undisturbed(nproc), patience=2)
    most = INTERVAL * (2 if save_async else 1)
    assert all(recovery.redone <= most for recovery in recoveries)


def test_a_run_that_gets_sigterm_saves_and_can_be_resumed(launch, settings, tmp_path, undisturbed):
    """It ends with code 75; the resumed run ends bit-identical to an undisturbed one."""
    first = launch("stopped", 2)
    folder = tmp_path / "stopped"
    assert first.wait_for(lambda: first.steps() >= 7)
    addresses = listening_addresses(first.pids().values())
    assert addresses == {"0100007F"}, "it listens on the network, or not at all"
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(timeout=60) == 75
    assert first.text().count("stopped as asked, after batch") == 1
    done = first.steps()
    assert 7 <= done < BATCHES
    assert (folder / f"ba{done}" / "manifest.json").exists()
    changes = LENGTH | {"save_folder": str(folder), "autoresume": True}
    rest = run(runs.trained, LAYOUTS[2], settings, tmp_path, **changes)
    whole, _ = undisturbed(2)
    assert rest.losses == whole.losses[done:]
    assert rest.digest == whole.digest


def test_a_second_launch_in_the_folder_of_the_first_is_refused(launch, tmp_path):
    """The first one holds the folder's lock in its rank 0, and trains on undisturbed."""
    first = launch("locked", 2, max_duration="5000ba")
    assert first.wait_for(lambda: first.steps() >= 2)
    holder = first.pids()[0]
    second = launch("locked", 2, autoresume=True)
    assert second.process.wait(timeout=100) == 2
    assert f"is being written by process {holder}; wait until it ends" in second.text()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(timeout=60) == 75
    lines = (tmp_path / "locked" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    batches = [line["batch"] for line in steps if line["kind"] == "train"]
    assert batches == list(range(1, len(batches) + 1))
    assert (tmp_path / "locked" / f"ba{batches[-1]}" / "manifest.json").exists()


def listening_addresses(pids):
    """Return the hexadecimal addresses of the TCP sockets that processes listen on."""
    links = [link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = {link.readlink().name for link in links if link.is_symlink()}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].partition(":")[0])
    return addresses
