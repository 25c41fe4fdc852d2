"""Packed documents over several ranks: the gradients of one process, and of each document alone."""

import json

import pytest
import torch
from harness import layout_runs as runs
from harness.layouts import run

from tokenyard.tolerance import relative_error


@pytest.fixture
def packed(settings, tmp_path):
    """The settings of a run on prompts and responses, in rows of 24 tokens."""
    path = tmp_path / "sums.jsonl"
    rows = ({"prompt": f"{n} + {n} = ", "response": str(2 * n) * (n % 3 + 1)} for n in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = {"name": "finetuning", "dataset": {"path": str(path)}}
    return settings | {"train_loader": loader, "eval_loader": loader}


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp-2", "fsdp-2-ep2"])
def test_gradients_equal_those_of_one_process(layout, packed, tmp_path):
    """Two microbatches in each; ranks have different numbers of supervised tokens."""
    want = run(runs.packed_gradients, "single", packed, tmp_path)
    got = run(runs.packed_gradients, layout, packed, tmp_path)
    assert (got.pop("tokens"), got.pop("supervised")) == (
        want.pop("tokens"),
        want.pop("supervised"),
    )
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(torch.tensor(got[name]), torch.tensor(value)) < 1e-12, name
