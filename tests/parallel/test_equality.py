"""Every layout equals one process: outputs, gradients, their norm, losses, trained parameters."""

from itertools import product

import pytest
import torch
from harness.compare import ROUTINGS, compare, pairwise
from harness.equality import Case, Layout, expert_numel

from tokenyard.testing import ranks

EXCHANGES = (
    ("all_to_all", 1),
    ("all_to_all_tokens", 1),
    ("all_to_all_tokens", 3),
    ("symmetric_memory", 1),
)
STRATEGIES = (("ddp", 1), ("fsdp", 1), ("fsdp", 2))


def layouts():
    for count in (2, 4):
        degrees = [degree for degree in (1, 2, 4) if degree <= count]
        for (strategy, replicate), degree in product(STRATEGIES, degrees):
            if replicate > 1 and (count // replicate) % degree and count > replicate:
                continue  # a replica of two ranks has no four expert-parallel ranks
            for exchange, chunks in EXCHANGES if degree > 1 else (("auto", 1),):
                yield Layout(strategy, count, degree, exchange, replicate, chunks)


LAYOUTS = list(layouts())
RECOMPUTES = ("", "whole", "selective")
TRAINED = ((False, False), (True, False), (False, True))  # frozen experts, adapters
CASES = [
    Case(routing, accumulation, recompute, *trained)
    for routing, accumulation, recompute, trained in product(ROUTINGS, (1, 3), RECOMPUTES, TRAINED)
]
MUON = [case._replace(muon=True) for case in CASES if not case.lora]
STORED = [
    case._replace(moments=moments)
    for case, moments in product((CASES[0], MUON[0]), ("bf16", "8bit"))
]


@pytest.mark.parametrize(("layout", "case"), pairwise(LAYOUTS, [*CASES, *MUON, *STORED]), ids=str)
def test_a_layout_equals_one_process(layout, case):
    """A selection of layouts and cases that covers every pair of options; two steps in float64."""
    worst = compare(layout, [case._replace(steps=2)])
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize(
    "layout", [Layout("fsdp", 4), Layout("fsdp", 4, 2, "all_to_all_tokens")], ids=str
)
def test_fewer_experts_than_shards_are_sharded_along_another_dimension(layout):
    """Every rank holds equally many numbers of them, and the result is the same."""
    case = Case("indivisible", 3, experts=2, steps=2)
    worst = compare(layout, [case, case._replace(muon=True)])
    assert max(worst.values()) <= 1e-12, worst
    assert len(set(ranks(4).run(expert_numel, layout))) == 1


@pytest.mark.parametrize("layout", LAYOUTS[1::7], ids=str)
def test_in_float32(layout):
    cases = [Case(), Case("indivisible", 3)]
    worst = compare(layout, [case._replace(dtype=torch.float32) for case in cases])
    assert max(worst.values()) <= 1e-5, worst


FP8_LAYOUTS = [
    Layout("ddp", 2, 2, "all_to_all"),
    Layout("fsdp", 2, 2, "all_to_all_tokens", chunks=2),
    Layout("fsdp", 4, 2, "all_to_all_tokens"),
]
FP8_CASES = [
    [Case("dropped", 3), Case("idle_rank", recompute="selective")],
    [Case("empty_batch"), Case("one_expert", recompute="whole")],
    [Case("indivisible", 3), Case("every_expert", lora=True)],
]


@pytest.mark.parametrize(("layout", "cases"), [*zip(FP8_LAYOUTS, FP8_CASES)], ids=str)
def test_tokens_in_fp8_on_the_wire(layout, cases):
    """Every layout equals one process that rounds the same rows; two steps in float64."""
    worst = compare(layout, [case._replace(fp8=True, steps=2) for case in cases])
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.full
@pytest.mark.timeout(1800)  # some minutes on idle cores
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equality_matrix(layout):
    """Every case of a layout, and 50 steps of every routing; prints its row of the table (-s)."""
    plain = [Case(routing, steps=50) for routing in ROUTINGS]
    mixed = [
        Case(routing, 3, RECOMPUTES[1 + i // 2 % 2], i % 2 == 1, steps=50)
        for i, routing in enumerate(ROUTINGS)
    ]
    muon = [case._replace(muon=True, steps=3) for case in mixed]
    worst = compare(layout, [*CASES, *plain, *mixed, *muon, *STORED])
    narrow = [Case(r, a, dtype=torch.float32) for r, a in product(ROUTINGS, (1, 3))]
    single = compare(layout, narrow)
    kinds = ("y", "grad", "norm", "auxiliary", "final")
    columns = " | ".join(f"{worst[kind]:.1e}" for kind in kinds)
    print(f"\n| {layout} | {columns} | {max(single.values()):.1e} |")
    assert max(worst.values()) <= 1e-12, worst
    assert max(single.values()) <= 1e-5, single
