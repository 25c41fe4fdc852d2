"""Gradients that are computed in 16 bits are summed over ranks in float32."""

import pytest
import torch
from harness import layout_runs as runs
from test_training import run

from tokenyard.tolerance import relative_error

NARROW = {"precision": "amp_bf16", "algorithms": {}, "device_train_microbatch_size": 2}


@pytest.mark.parametrize("layout", ["fsdp-2", "ddp-2"])
def test_the_sum_over_ranks_is_that_of_one_process_over_the_same_microbatches(
    settings, tmp_path, layout
):
    """Which adds up in float32; a sum in bfloat16 would be off by some 2e-3."""
    for weight in (
        "moe_loss_weight",
        "moe_zloss_weight",
    ):  # these depend on which samples are computed together
        settings["model"]["ffn_config"][weight] = 0.0
    alone = run(runs.gradients, "single", settings, tmp_path, **NARROW)
    found = run(runs.gradients, layout, settings, tmp_path, **NARROW)
    assert found.keys() == alone.keys()
    for name in alone:
        got, want = torch.tensor(found[name]), torch.tensor(alone[name])
        assert want.norm() > 0
        assert relative_error(got, want) < 1e-6, name
