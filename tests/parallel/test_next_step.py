"""Ranks launch their collectives in one order, also if steps are launched early."""

import pytest
from harness import early_runs
from harness.layouts import run

from tokenyard.testing import RanksError

LENGTH = {"max_duration": "6ba", "eval_interval": "6ba", "save_interval": "6ba"}


def test_a_callback_on_one_rank_makes_all_ranks_wait_for_the_numbers(settings, tmp_path):
    """Else a stopped run ends with one rank in a save, and the others in the next step."""
    parallel = {"parallel": {"strategy": {"name": "ddp", "timeout": 30}}}
    end = run(early_runs.stopped, "ddp-2", settings, tmp_path, "callback", **LENGTH, **parallel)
    assert "after batch 2 of 6, which is saved" in end


def test_a_launch_that_fails_on_one_rank_ends_a_run_that_is_stopped(settings, tmp_path):
    """The rank cannot save: the others wait for it in the collectives of the launched step."""
    with pytest.raises(RanksError, match="rank 0: died"):
        run(early_runs.stopped, "ddp-2", settings, tmp_path, "failure", **LENGTH)
    assert (tmp_path / "ddp-2" / "error.txt").read_text() == "out of luck"
