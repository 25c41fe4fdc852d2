"""Gradients that are computed in 16 bits are summed over ranks in float32."""

import pytest
import torch
from harness import layout_runs as runs
from harness.layouts import run

from tokenyard.tolerance import relative_error

NARROW = {"precision": "amp_bf16", "algorithms": {}, "device_train_microbatch_size": 2}


@pytest.mark.parametrize(("layout", "early"), [("fsdp-2", ()), ("ddp-2", ()), ("ddp-2", (100,))])
def test_the_sum_over_ranks_equals_that_of_one_process(settings, tmp_path, layout, early):
    """One process sums microbatches in float32; a bfloat16 sum would differ by about 2e-3."""
    # auxiliary losses depend on which samples are computed together
    settings["model"]["ffn_config"] |= {"moe_loss_weight": 0.0, "moe_zloss_weight": 0.0}
    single = run(runs.gradients_of, "single", settings, tmp_path, True, **NARROW)
    gradients = run(runs.gradients_of, layout, settings, tmp_path, True, *early, **NARROW)
    assert gradients.keys() == single.keys()
    for name in single:
        actual = torch.tensor(gradients[name])
        expected = torch.tensor(single[name])
        assert expected.norm() > 0
        assert relative_error(actual, expected) < 1e-6, name
