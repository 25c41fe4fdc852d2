"""Adapters are trained in every layout as in one process."""

import pytest
from harness import layout_runs as runs
from test_training import run


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-2-ep2", "ddp-2-ep2"])
def test_losses_are_those_of_one_process(settings, tmp_path, layout):
    lora = {"lora": {"rank": 2, "train_also": ["*norm*"]}}
    alone = run(runs.trained, "single", settings, tmp_path, **lora)
    found = run(runs.trained, layout, settings, tmp_path, **lora)
    assert found.losses == pytest.approx(alone.losses, rel=1e-5)
    assert alone.losses[-1] < alone.losses[0]
