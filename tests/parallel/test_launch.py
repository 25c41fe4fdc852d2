"""`tokenyard launch`: runs whose ranks are killed, hang or get a signal end undisturbed."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from harness import layout_runs as runs
from harness.layouts import run
from harness.supervisor import SupervisedRun, draw_faults
from safetensors.torch import load_file

from tokenyard_train.folder_lock import LOCK, lock_folder

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


def start(settings, folder, nproc, *options, **changes):
    """Start a supervised run in a folder; more settings override those of the file."""
    config = settings | LENGTH
    config |= {
        "device_train_microbatch_size": 4 // nproc,
        "device_eval_batch_size": 2,
        "parallel": PARALLEL[nproc],
        "save_folder": str(folder),
    }
    return SupervisedRun(config | changes, nproc, *options)


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


def inject(launched, faults, patience):
    """Inject faults, and check what the supervisor reports; return what each one cost."""
    recoveries = []
    for fault in faults:
        recovery = launched.inject(fault)
        recoveries.append(recovery)
        print(f"\n{fault}: {recovery}", flush=True)
        if fault.kind == "stop":
            assert recovery.detected <= TIMEOUT + patience
            reason = f"rank {fault.rank} hangs (it is stopped)"  # and what waited for it, if any
            assert reason in recovery.message, launched.text()
        else:
            reason = f"rank {fault.rank} ended by signal SIGKILL; restart "
            assert reason in recovery.message
    assert len(launched.restarts) == len(faults), launched.text()
    return recoveries


@pytest.fixture(scope="module")
def disturbed(small_config, tmp_path_factory):
    """A run whose ranks are killed and hang at random moments, and which then gets SIGTERM.

    Starting ranks takes longer than their steps, so the tests below share this run.
    """
    faults = draw_faults(2, ["kill while saving", "stop"], 2, BATCHES // 2)
    folder = tmp_path_factory.mktemp("disturbed") / "run"
    launched = start(small_config(), folder, 2, "--max-restarts", str(len(faults)))
    # other tests run at the same time, so the supervisor may be slow
    launched.recoveries = inject(launched, faults, patience=10)
    launched.addresses = listening_addresses(launched.pids().values())
    launched.process.send_signal(signal.SIGTERM)
    launched.process.wait(timeout=60)
    return launched


def test_ranks_that_are_killed_or_hang_are_restarted(disturbed):
    """From the last checkpoint. `inject` compares the reports of the supervisor."""
    assert len(disturbed.recoveries) == 2
    assert all(recovery.redone <= INTERVAL for recovery in disturbed.recoveries)


def test_ranks_listen_on_the_loopback_interface_only(disturbed):
    assert disturbed.addresses == {"0100007F"}, "it listens on the network, or not at all"


def test_a_run_that_gets_sigterm_saves_and_ends_with_75(disturbed):
    assert disturbed.process.returncode == 75
    assert disturbed.text().count("stopped as asked, after batch") == 1
    done = disturbed.steps()
    assert 0 < done < BATCHES
    assert (disturbed.folder / f"ba{done}" / "manifest.json").exists()


def test_a_disturbed_run_resumes_to_the_same_end(disturbed, settings, tmp_path, undisturbed):
    """Bit-identical to an undisturbed run."""
    folder = shutil.copytree(disturbed.folder, tmp_path / "resumed")
    done = disturbed.steps()
    changes = LENGTH | {"save_folder": str(folder), "autoresume": True}
    rest = run(runs.trained, LAYOUTS[2], settings, tmp_path, **changes)
    whole, whole_folder = undisturbed(2)
    assert rest.losses == whole.losses[done:]
    assert rest.digest == whole.digest
    assert final_state(folder) == final_state(whole_folder)


@pytest.mark.full
@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_many_faults(settings, tmp_path, undisturbed, nproc, seed):
    """Six kills and two hangs, some while a checkpoint is written; prints their costs (-s)."""
    kinds = ["kill"] * 3 + ["kill while saving"] * 3 + ["stop"] * 2
    faults = draw_faults(10 * seed + nproc, kinds, nproc, BATCHES)
    save_async = seed % 2 == 1
    options = ("--max-restarts", str(len(faults)))
    launched = start(settings, tmp_path / "disturbed", nproc, *options, save_async=save_async)
    recoveries = inject(launched, faults, patience=2)
    assert launched.process.wait(timeout=200) == 0, launched.text()
    assert final_state(launched.folder) == final_state(undisturbed(nproc)[1])
    most = INTERVAL * (2 if save_async else 1)
    assert all(recovery.redone <= most for recovery in recoveries)


def test_a_launch_in_a_folder_that_another_process_writes_is_refused(settings, tmp_path):
    folder = tmp_path / "locked"
    with lock_folder(folder):
        launched = start(settings, folder, 2)
        assert launched.process.wait(timeout=100) == 2
        names = {path.name for path in folder.iterdir()}
    assert f"is being written by process {os.getpid()}; wait until it ends" in launched.text()
    assert names == {LOCK}


@pytest.mark.full
def test_a_second_launch_in_the_folder_of_the_first_is_refused(settings, tmp_path):
    """The first one holds the folder's lock in its rank 0, and trains on undisturbed."""
    folder = tmp_path / "locked"
    first = start(settings, folder, 2, max_duration="5000ba")
    assert first.wait_for(lambda: first.steps() >= 2)
    holder = first.pids()[0]
    second = start(settings, folder, 2, autoresume=True)
    assert second.process.wait(timeout=100) == 2
    assert f"is being written by process {holder}; wait until it ends" in second.text()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(timeout=60) == 75
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    batches = [line["batch"] for line in steps if line["kind"] == "train"]
    assert batches == list(range(1, len(batches) + 1))
    assert (folder / f"ba{batches[-1]}" / "manifest.json").exists()


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
