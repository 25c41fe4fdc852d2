"""Two GPUs compute what one does, over NCCL."""

import pytest
import torch
from harness import layout_runs as runs
from harness.equality import Case, Layout, train
from test_equality import ROUTINGS, compare

from tokenyard.testing import ranks
from tokenyard.tolerance import relative_error

pytestmark = pytest.mark.multigpu

LAYOUTS = [
    Layout("ddp", 2),
    Layout("fsdp", 2),
    Layout("fsdp", 2, 2, "all_to_all"),
    Layout("fsdp", 2, 2, "all_to_all_tokens"),
    Layout("fsdp", 2, 2, "all_to_all_tokens", chunks=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_in_float64(layout):
    """By core's kernel, the only one in float64."""
    worst = compare(layout, [Case(r, a, device="cuda", steps=3) for r in ROUTINGS for a in (1, 3)])
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_in_float32(layout):
    """By the best kernel that there is."""
    worst = compare(
        layout, [Case(r, a, dtype=torch.float32, device="cuda") for r in ROUTINGS for a in (1, 3)]
    )
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_in_bfloat16(layout):
    """As near to float64 as one GPU in bfloat16 is, within twice its error."""
    case = Case("indivisible", dtype=torch.bfloat16, device="cuda")
    exact = train(Layout(), case._replace(dtype=torch.float32, device="cuda"))
    alone = train(Layout(), case)
    found = ranks(2, "cuda").run(on_rank_of, layout, case)[0]
    for name in ("y", *(n for n in alone if n.startswith("grad"))):
        want = exact[name].double().cpu()
        allowed = (
            2 * relative_error(alone[name].double().cpu(), want) + torch.finfo(torch.bfloat16).eps
        )
        assert relative_error(torch.from_numpy(found[name]), want) <= allowed, name


def on_rank_of(layout, case):
    return {name: value.double().cpu().numpy() for name, value in train(layout, case).items()}


def test_a_checkpoint_of_two_gpus_loads_on_one(settings, tmp_path):
    """Model and optimizer, bit by bit."""
    two = settings | {"device": "cuda", "parallel": {"strategy": "fsdp", "expert_parallel": 2}}
    two |= {
        "device_train_microbatch_size": 2,
        "save_folder": str(tmp_path / "run"),
        "max_duration": "2ba",
    }
    saved, other = ranks(2, "cuda").run(runs.trained, two)
    assert saved == other
    one = two | {"parallel": {}, "autoresume": True, "device": "cuda"}
    assert runs.loaded(one).digest == saved.digest
