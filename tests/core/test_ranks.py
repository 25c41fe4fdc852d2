"""The processes of tests over several ranks: what a test is told about a rank that hangs."""

import time

import pytest
import torch.distributed as dist

from tokenyard.testing import RanksError
from tokenyard.testing import _ranks as kit


def hang_on_rank_1():
    """Rank 0 answers."""
    if dist.get_rank() == 1:
        time.sleep(600)


def test_the_stacks_of_a_rank_that_hangs_are_reported(monkeypatch):
    """All ranks have the same time, and a stuck collective may hold the interpreter's lock."""
    monkeypatch.setattr(kit, "_SPARE", 0.0)
    pool = kit.Ranks(2)
    pool.timeout = 2.0
    began = time.monotonic()
    with pytest.raises(RanksError) as caught:
        pool.run(hang_on_rank_1)
    assert time.monotonic() - began < 60
    text = str(caught.value)
    assert text.startswith("rank 1: no answer in 2 s\n")
    assert "in hang_on_rank_1" in text
    assert pool.closed
