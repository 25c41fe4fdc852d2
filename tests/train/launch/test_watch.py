"""A collective that does not end is named, and ends its rank."""

import json
import sys
import time

import pytest
import torch.distributed as dist

from tokenyard_train.launch.supervisor import supervise
from tokenyard_train.launch.watch import _write_stacks, oldest

RANK = """
import os, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from tokenyard_train.launch.watch import watch

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=timedelta(minutes=1))
x = torch.ones(2)
dist.all_reduce(x)
arguments = (lambda: 0, 1.0, Path(sys.argv[1]), threading.Event())
threading.Thread(target=watch, args=arguments, daemon=True).start()
if rank == 0:
    dist.all_reduce(x)
time.sleep(60)
"""


def entry(number, function, state="started", retired=False, seconds=3.0):
    return {
        "collective_seq_id": number,
        "process_group": ["1", "mesh_shard"],
        "profiling_name": f"nccl:{function}",
        "retired": retired,
        "state": state,
        "time_created_ns": time.time_ns() - int(seconds * 1e9),
    }


def test_the_oldest_collective_that_has_not_ended():
    entries = [
        entry(7, "all_reduce", retired=True, seconds=5),  # the watchdog knows that it has ended
        entry(8, "all_reduce", state="completed", seconds=4),
        entry(10, "all_gather", state="scheduled", seconds=2),
        entry(9, "all_to_all", seconds=3),
    ]
    waiting = oldest(json.dumps({"entries": entries}))
    assert waiting.name == "all_to_all 9 of the group mesh_shard"
    assert waiting.seconds == pytest.approx(3, abs=1)
    assert oldest(json.dumps({"entries": entries[:2]})) is None
    assert oldest("{}") is None


@pytest.mark.skipif(dist.is_nccl_available(), reason="torch records NCCL alone")
def test_a_rank_that_waits_too_long_names_its_collective(capfd, tmp_path, monkeypatch):
    """Torch records gloo's collectives as NCCL's."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    began = time.monotonic()
    assert supervise(lambda _: [sys.executable, "-c", RANK, str(tmp_path)], 2, 0) == 1
    assert time.monotonic() - began < 55, "it is gloo that noticed"
    path = tmp_path / "fault-rank0.txt"
    assert capfd.readouterr().err.strip() == (
        "rank 1 hangs: rank 0 waited in all_reduce 2 of the group default_pg (it did not end "
        f"in 1 seconds; the stacks are in {path}); no restart is left"
    )
    assert "in all_reduce" in path.read_text()
    assert [*tmp_path.iterdir()] == [path]


def test_stacks_that_cannot_be_written_keep_no_rank_alive(tmp_path):
    sentence = _write_stacks(tmp_path / "missing")
    assert sentence.startswith("the stacks could not be written (")
