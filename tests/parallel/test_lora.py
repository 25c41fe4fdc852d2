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


def test_checkpoints_of_adapters_load_in_every_layout(settings, tmp_path):
    """Each layout finds the same digest of the base, and has the same state."""
    lora = LORA | {"save_folder": str(tmp_path / "run"), "max_duration": "2ba"}
    run(runs.trained, "fsdp-2-ep2", settings, tmp_path, **lora)
    lora["autoresume"] = True
    loaded = [
        run(runs.loaded, layout, settings, tmp_path, **lora)
        for layout in ("single", "ddp-2", "fsdp-2-ep2", "hsdp-4-ep2")
    ]
    assert loaded[0].batch == 2
    assert all(other.digest == loaded[0].digest for other in loaded)
