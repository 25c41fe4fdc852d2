"""Compiled blocks over ranks compute what eager blocks do, and are compiled once."""

import pytest
from harness import layout_runs as runs
from harness.layouts import run

CASES = [  # layout, recompute, compiled graphs
    ("ddp-2", False, 1),
    # eager experts cut a block in two, and the input of the first block needs no gradient
    ("fsdp-2", True, 4),
    ("fsdp-2-ep2", False, 4),
]


@pytest.mark.parametrize(("layout", "recompute", "graphs"), CASES)
def test_compiled_blocks_compute_the_same(settings, tmp_path, layout, recompute, graphs):
    changes = {"max_duration": "2ba", "activation_checkpointing": recompute}
    losses, compiled = run(runs.compiled, layout, settings, tmp_path, **changes)
    expected = run(runs.trained, layout, settings, tmp_path / "eager", **changes).losses
    assert losses == pytest.approx(expected, rel=1e-5)
    assert compiled == graphs
