"""Bfloat16 weights with float32 masters, in every layout as on one device."""

import pytest
from harness import layout_runs
from harness.layouts import PARALLEL_LAYOUTS, run

FP32 = {"max_duration": "4ba"}
BF16 = FP32 | {"precision": "bf16_master"}
SHORT = ("ddp-2", "fsdp-2-ep2")  # layouts of every run; the others are `full`


def layouts():
    for layout in PARALLEL_LAYOUTS:
        marks = () if layout in SHORT else pytest.mark.full
        yield pytest.param(layout, marks=marks)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layout", list(layouts()))
def test_losses_are_those_of_one_device_but_for_rounding(settings, tmp_path, layout, rows):
    """`rows` is the microbatch of a rank: several are summed, or one is not.

    Layouts differ no more from each other than bfloat16 differs from float32.
    """
    changes = BF16 | {"device_train_microbatch_size": rows}
    exact = run(layout_runs.trained, "single", settings, tmp_path / "fp32", **FP32)
    alone = run(layout_runs.trained, "single", settings, tmp_path, **changes)
    together = run(layout_runs.trained, layout, settings, tmp_path, **changes)
    noise = max(abs(a - b) for a, b in zip(alone.losses, exact.losses))
    assert together.losses == pytest.approx(alone.losses, abs=2 * noise)
    assert 0 < noise < 0.05


def test_a_resumed_run_ends_bit_for_bit_as_the_whole(settings, tmp_path):
    halves = tmp_path / "halves"
    for duration in ("2ba", "4ba"):
        changes = BF16 | {"max_duration": duration, "autoresume": True}
        changes |= {"scheduler": {"name": "constant_with_warmup"}}
        last = run(layout_runs.trained, "fsdp-2-ep2", settings, halves, **changes)
    constant = {"scheduler": {"name": "constant_with_warmup"}}
    whole = run(layout_runs.trained, "fsdp-2-ep2", settings, tmp_path / "w", **BF16, **constant)
    assert last.digest == whole.digest
