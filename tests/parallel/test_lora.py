"""LoRA adapters train in every layout as in one process."""

import pytest
from harness import layout_runs as runs
from harness.layouts import run

LORA = {"lora": {"rank": 2, "targets": "*", "train_also": ["*norm*"]}}


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-5), ("bf16_master", 0.02)])
def test_losses_equal_those_of_one_process(settings, tmp_path, precision, rel):
    changes = LORA | {"precision": precision}
    single = run(runs.trained, "single", settings, tmp_path, **changes)
    assert single.losses[-1] < single.losses[0]
    for layout in ("fsdp-2", "fsdp-2-ep2", "ddp-2-ep2"):
        result = run(runs.trained, layout, settings, tmp_path, **changes)
        assert result.losses == pytest.approx(single.losses, rel=rel), layout
