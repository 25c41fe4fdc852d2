"""Two GPUs equal one, over NCCL."""

from itertools import product

import pytest
import torch
from harness import layout_runs as runs
from harness.compare import ROUTINGS, compare
from harness.equality import Case, Layout, arrays_on_rank, as_arrays, batch_of, build, train
from harness.supervisor import draw_faults
from test_launch import BATCHES, final_state, inject, start

from tokenyard.testing import ranks
from tokenyard.tolerance import relative_error

pytestmark = pytest.mark.multigpu

LAYOUTS = [
    Layout("ddp", 2),
    Layout("fsdp", 2),
    Layout("fsdp", 2, 2, "all_to_all"),
    Layout("fsdp", 2, 2, "all_to_all_tokens"),
    Layout("fsdp", 2, 2, "all_to_all_tokens", chunks=3),
    Layout("fsdp", 2, 2, "symmetric_memory"),
]
SENDING_FP8 = LAYOUTS[2:5]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_in_float64(layout):
    """By core's kernel, the only one that computes in float64."""
    worst = compare(layout, [Case(r, a, device="cuda", steps=3) for r in ROUTINGS for a in (1, 3)])
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_in_float32(layout):
    """By the kernel that `auto` chooses."""
    cases = [Case(r, a, dtype=torch.float32, device="cuda") for r in ROUTINGS for a in (1, 3)]
    worst = compare(layout, cases)
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize(
    ("layout", "fp8"), [*product(LAYOUTS, [False]), *product(SENDING_FP8, [True])], ids=str
)
def test_parity_in_bfloat16(layout, fp8):
    """The error against float32 is at most twice that of one GPU in bfloat16."""
    case = Case("indivisible", dtype=torch.bfloat16, device="cuda", fp8=fp8)
    exact = as_arrays(train(Layout(), case._replace(dtype=torch.float32)))
    single = as_arrays(train(Layout(), case))
    results = ranks(2, "cuda").run(arrays_on_rank, layout, case)[0]
    for name in ("y", *(n for n in single if n.startswith("grad"))):
        expected = torch.from_numpy(exact[name])
        error = relative_error(torch.from_numpy(single[name]), expected)
        allowed = 2 * error + torch.finfo(torch.bfloat16).eps
        assert relative_error(torch.from_numpy(results[name]), expected) <= allowed, name


@pytest.mark.parametrize("layout", SENDING_FP8, ids=str)
def test_tokens_in_fp8_on_the_wire(layout):
    """In float64, two GPUs equal one that rounds the same rows."""
    cases = [Case(r, a, device="cuda", fp8=True) for r in (*ROUTINGS, "dropped") for a in (1, 3)]
    worst = compare(layout, cases)
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
def test_copies_between_gpus_move_what_collectives_do(settings, tmp_path, precision):
    """Shards of experts, and their gradients: bit by bit over four steps of two microbatches."""
    two = settings | {"device": "cuda", "precision": precision, "deterministic": True}
    two |= {"max_duration": "4ba", "device_train_microbatch_size": 1}
    digests = []
    for transfers in ("copies", "collectives"):
        strategy = {"name": "fsdp", "transfers": transfers}
        folder = str(tmp_path / transfers)
        changes = {"parallel": {"strategy": strategy}, "save_folder": folder}
        first, second = ranks(2, "cuda").run(runs.trained, two | changes)
        assert first == second
        digests.append(first.digest)
    assert digests[0] == digests[1]


def streams_of_gathered_experts():
    """Return the streams whose memory the gathered experts of the last block are in."""
    case = Case(dtype=torch.float32, device="cuda")
    _, model = build(Layout("fsdp", 2, transfers="copies"), case)
    x, ids = batch_of(case)
    model(x.cuda(), [i.cuda() for i in ids])
    address = model.blocks[-1].moe.experts.up.data_ptr()  # they stay gathered
    compute = torch.cuda.current_stream().cuda_stream
    return compute, [
        segment["stream"]
        for segment in torch.cuda.memory_snapshot()
        if 0 <= address - segment["address"] < segment["total_size"]
    ]


def test_copies_are_in_memory_of_the_stream_that_computes():
    """FSDP frees them while that stream may use them. Memory of others may be taken from it."""
    for compute, streams in ranks(2, "cuda").run(streams_of_gathered_experts):
        assert streams == [compute]


def test_a_checkpoint_of_two_gpus_loads_on_one(settings, tmp_path):
    """Model and optimizer, bit by bit."""
    two = settings | {
        "device": "cuda",
        "parallel": {"strategy": "fsdp", "expert_parallel": 2},
        "device_train_microbatch_size": 2,
        "save_folder": str(tmp_path / "run"),
        "max_duration": "2ba",
    }
    saved, other = ranks(2, "cuda").run(runs.trained, two)
    assert saved == other
    one = two | {"parallel": {}, "autoresume": True}
    assert runs.loaded(one).digest == saved.digest


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("exchange", ["all_to_all_tokens", "symmetric_memory"])
@pytest.mark.parametrize("seed", range(5))
def test_many_faults(settings, tmp_path, seed, exchange):
    """Four kills and two stops end bit-identical; each is noticed within 2 s of the timeout."""
    keys = {"device": "cuda", "deterministic": True, "backends": {"exchange": exchange}}
    whole = start(settings, tmp_path / "whole", 2, **keys)
    faults = draw_faults(seed, ["kill", "kill while saving", "stop"] * 2, 2, BATCHES)
    disturbed = start(settings, tmp_path / "run", 2, "--max-restarts", str(len(faults)), **keys)
    inject(disturbed, faults, patience=2)
    for launched in (whole, disturbed):
        assert launched.process.wait(timeout=200) == 0, launched.text()
    assert final_state(disturbed.folder) == final_state(whole.folder)
