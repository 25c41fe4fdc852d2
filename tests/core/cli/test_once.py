"""Several ranks print an error or a warning once."""

import logging
import os
import subprocess
import sys
from collections import Counter
from threading import Event

import pytest

from tokenyard_cli import once

RANK = """
import logging, os, sys
from tokenyard import ConfigError
from tokenyard_cli.exit import run_and_exit

def command():
    logging.getLogger("tokenyard").warning("the corpus is small")
    logging.getLogger("tokenyard").warning("the corpus is small")
    if os.environ["RANK"] == "1":
        raise ConfigError("rank 1 has no folder; make one")
    raise ConfigError("lr is 0; give a number above 0")

run_and_exit(command)
"""
ONCE = {
    "WARNING: the corpus is small": 2,  # each rank logs it twice
    "error: rank 1 has no folder; make one": 1,
    "error: lr is 0; give a number above 0": 1,
}


def errors_of_ranks(environment):
    """Run three ranks; return how often each line is on stderr."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | environment | {"WORLD_SIZE": "3", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    texts = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    return Counter("".join(texts).splitlines())


def test_the_ranks_of_launch_share_a_folder(tmp_path):
    assert errors_of_ranks({"TOKENYARD_NOTES": str(tmp_path)}) == ONCE


def test_the_ranks_of_torchrun_share_its_store(tmp_path):
    """The first rank that fails prints, before torchrun ends the others."""
    program = tmp_path / "rank.py"
    program.write_text(RANK.replace('os.environ["RANK"] == "1"', "False"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=120)
    lines = Counter(done.stderr.splitlines())
    assert lines["error: lr is 0; give a number above 0"] == 1
    assert lines["WARNING: the corpus is small"] == 2


@pytest.mark.parametrize("environment", [{}, {"TOKENYARD_NOTES": "/no/such/folder"}])
def test_ranks_that_share_nothing_all_print(environment):
    assert errors_of_ranks(environment) == {
        "WARNING: the corpus is small": 6,
        "error: rank 1 has no folder; make one": 1,
        "error: lr is 0; give a number above 0": 2,
    }


def test_a_record_with_a_wrong_format_ends_no_run():
    """A library's own mistake: logging prints where it is."""
    record = logging.LogRecord("library", logging.WARNING, "", 1, "%d files", ("no",), None)
    assert once.FirstRankOnly().filter(record)


def test_a_rank_waits_once_for_a_store_that_is_gone(monkeypatch):
    keys = []

    def lose(key):
        keys.append(key)
        raise RuntimeError("the client socket has timed out")

    monkeypatch.setattr("tokenyard.processes.count_in_store", lose)
    monkeypatch.setattr(once, "_store_lost", Event())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TOKENYARD_NOTES", raising=False)
    assert once.is_first("a warning")
    assert once.is_first("another")
    assert len(keys) == 1
