"""A checkpoint that a run deletes while several ranks read it."""

import json
import re
import shutil

import pytest
import torch.distributed as dist

from tokenyard.testing import RanksError, ranks
from tokenyard_train.checkpoint import write_checkpoint
from tokenyard_train.checkpoint.store import read_newest


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two checkpoints."""
    for batch in (3, 4):
        write_checkpoint(tmp_path, f"ba{batch}", {}, {"batch": batch}, keep=2)
    return tmp_path


def read_on_rank(folder, late, act):
    """Return what the ranks read, and which checkpoints they saw. `late` reads after `act`."""
    seen = []

    def read(checkpoint):
        seen.append(checkpoint.name)
        if dist.get_rank() != late:
            batch = json.loads((checkpoint / "run.json").read_text())["batch"]
        dist.barrier()
        if dist.get_rank() == late:
            if len(seen) == 1:
                act(checkpoint)
            batch = json.loads((checkpoint / "run.json").read_text())["batch"]
        return batch

    return read_newest(folder, read), seen


def read_with_pruning(folder, late):
    return read_on_rank(folder, late, shutil.rmtree)


def read_with_damage(folder, late):
    return read_on_rank(folder, late, lambda checkpoint: (checkpoint / "run.json").unlink())


@pytest.mark.parametrize("late", [0, 1])
def test_all_ranks_take_the_same_checkpoint_again(run, late):
    assert ranks(2).run(read_with_pruning, run, late) == [(3, ["ba4", "ba3"])] * 2


@pytest.mark.parametrize("late", [0, 1])
def test_damage_that_one_rank_meets_ends_all_ranks(run, late):
    with pytest.raises(RanksError) as caught:
        ranks(2).run(read_with_damage, run, late)
    said = str(caught.value)
    for rank in (0, 1):
        assert re.search(rf"rank {rank}: .*?(CheckpointError|FileNotFoundError)", said, re.S)
    assert len(re.findall(r"No such file or directory: .*ba4/run\.json", said)) == 2
