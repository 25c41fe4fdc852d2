"""LoRA adapters train in every layout as in one process."""

import pytest
from harness import layout_runs as runs
from harness.layouts import run

LORA = {"lora": {"rank": 2, "train_also": ["*norm*"]}}


def test_losses_equal_those_of_one_process(settings, tmp_path):
    single = run(runs.trained, "single", settings, tmp_path, **LORA)
    assert single.losses[-1] < single.losses[0]
    for layout in ("fsdp-2", "fsdp-2-ep2", "ddp-2-ep2"):
        result = run(runs.trained, layout, settings, tmp_path, **LORA)
        assert result.losses == pytest.approx(single.losses, rel=1e-5), layout
