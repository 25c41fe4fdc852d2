"""Shards and gradients that are copied between ranks are those that collectives move."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import layout_runs
from harness.compare import compare
from harness.equality import Case, Layout, batch_of, build
from harness.layouts import run

from tokenyard import ConfigError, peer_memory
from tokenyard.testing import ranks
from tokenyard.testing._over_ranks import full
from tokenyard_parallel.strategies import FsdpStrategy
from tokenyard_parallel.strategies._peers import Peers, peers_of
from tokenyard_parallel.strategies._reduce_scatter import WideReduceScatter

CPU = torch.device("cpu")
LAYOUTS = [
    Layout("fsdp", 2, transfers="copies"),
    Layout("fsdp", 4, 2, "all_to_all_tokens", transfers="copies"),
    Layout("fsdp", 4, replicate=2, transfers="copies"),
]
CASES = [
    Case(accumulation=3, steps=2),
    Case(recompute="whole", steps=2),
    Case(frozen=True),
    Case(lora=True, steps=2),
    Case("idle_rank"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_equal_those_of_one_process(layout):
    worst = compare(layout, CASES)
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
def test_runs_end_bit_for_bit_alike(settings, tmp_path, precision):
    """In amp_bf16 shards are converted before they are copied; else they stay where they are."""
    changes = {"max_duration": "4ba", "precision": precision, "device_train_microbatch_size": 1}
    collectives = run(layout_runs.trained, "fsdp-2", settings, tmp_path, **changes)
    copies = run(layout_runs.trained, "fsdp-2-copies", settings, tmp_path, **changes)
    assert copies == collectives


def test_a_checkpoint_is_that_of_one_process(settings, tmp_path):
    changes = {"max_duration": "2ba"}
    saved = run(layout_runs.trained, "fsdp-2-copies", settings, tmp_path, **changes)
    folder = {"save_folder": str(tmp_path / "fsdp-2-copies"), "autoresume": True}
    assert run(layout_runs.loaded, "single", settings, tmp_path, **folder).digest == saved.digest
    assert run(layout_runs.loaded, "fsdp-2-copies", settings, tmp_path, **folder) == saved._replace(
        losses=[]
    )


def experts_unsharded_first():
    """Return whether experts are those of all shards in a first pass after ``unshard``."""
    _, model = build(LAYOUTS[0], Case())
    experts = model.blocks[1].moe.experts
    whole = full(experts.up)
    experts.unshard()
    experts.reshard()
    x, ids = batch_of(Case())
    model(x, ids)  # the last block stays gathered
    return torch.equal(experts.up, whole)


def test_experts_may_be_unsharded_before_the_first_pass():
    assert ranks(2).run(experts_unsharded_first) == [True, True]


def sums_of_growing_units(sum_dtype):
    """Reduce gradients of three units, of 6, 18 and 12 numbers, by copies.

    Return this rank's sums, and those of one process.
    """
    rank, count = dist.get_rank(), dist.get_world_size()
    reduce = WideReduceScatter(count, Peers(dist.group.WORLD, CPU), lambda: sum_dtype)
    results = []
    for size in (6, 18, 12):
        generator = torch.Generator().manual_seed(size)
        parts = torch.randn(count, size, generator=generator).bfloat16()
        gradients = reduce.allocate((size,), dtype=torch.bfloat16, device=CPU)
        total = reduce.allocate((size // count,), dtype=torch.bfloat16, device=CPU)
        gradients.copy_(parts[rank])
        total.fill_(torch.nan)
        reduce(total, gradients, dist.group.WORLD, dist.ReduceOp.SUM)
        expected = parts[:, rank * size // count :][:, : size // count].float()
        summed = expected[0].clone()
        for part in expected[1:]:
            summed += part
        results.append((total.tolist(), summed.to(sum_dtype).tolist()))
    return results


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sum_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_are_rounded_once(count, sum_dtype):
    for results in ranks(count).run(sums_of_growing_units, sum_dtype):
        for total, expected in results:
            assert total == expected


def choices(nodes):
    """Return what each choice of transfers gives, for ranks of which each is on one of `nodes`."""
    node = nodes[dist.get_rank()]
    given = []
    with patch.object(peer_memory, "node_number", lambda: node):
        for transfers in ("auto", "copies", "collectives"):
            try:
                given.append(type(peers_of(transfers, CPU, dist.group.WORLD)).__name__)
            except ConfigError as error:
                given.append(str(error))
    return given


def test_copies_are_made_on_one_node():
    """On CPUs only if they are asked for."""
    assert ranks(2).run(choices, (1, 1))[0] == ["NoneType", "Peers", "NoneType"]
    message = (
        "parallel.strategy.transfers is copies, which needs ranks that read each other's memory, "
        "and they are on several nodes; give collectives"
    )
    assert ranks(2).run(choices, (1, 2)) == [["NoneType", message, "NoneType"]] * 2


def test_an_unknown_choice_is_named():
    with pytest.raises(ConfigError, match=r"transfers 'copy' is unknown .*'copies'"):
        FsdpStrategy(transfers="copy")
