"""Ranks launch their collectives in one order, also if steps are launched early."""

from harness import early_runs
from harness.layouts import run

LENGTH = {"max_duration": "6ba", "eval_interval": "6ba", "save_interval": "6ba"}


def test_a_callback_on_one_rank_makes_all_ranks_wait_for_the_numbers(settings, tmp_path):
    """Else a stopped run ends with one rank in a save, and the others in the next step."""
    parallel = {"parallel": {"strategy": {"name": "ddp", "timeout": 30}}}
    end = run(early_runs.stopped, "ddp-2", settings, tmp_path, "callback", **LENGTH, **parallel)
    assert "after batch 2 of 6, which is saved" in end
