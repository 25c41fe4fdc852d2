"""Every layout computes what one process does: outputs, gradients, their norm, losses, trained parameters."""

import functools
from itertools import combinations, product

import pytest
import torch
from harness.equality import Case, Layout, numbers_of_experts, on_rank, train

from tokenyard.testing import ranks
from tokenyard.tolerance import relative_error

EXCHANGES = (("all_to_all", 1), ("all_to_all_tokens", 1), ("all_to_all_tokens", 3))


def _layouts():
    for count in (2, 4):
        degrees = [d for d in (1, 2, 4) if d <= count]
        for (strategy, replicate), degree in product(
            (("ddp", 1), ("fsdp", 1), ("fsdp", 2)), degrees
        ):
            if replicate > 1 and (count // replicate) % degree and count > replicate:
                continue  # copies of two ranks cannot share experts among four
            for exchange, chunks in EXCHANGES if degree > 1 else (("auto", 1),):
                yield Layout(strategy, count, degree, exchange, replicate, chunks)


LAYOUTS = list(_layouts())
ROUTINGS = ("natural", "one_expert", "idle_rank", "empty_batch", "every_expert", "indivisible")
CASES = [Case(r, a, c, f) for r, a, c, f in product(ROUTINGS, (1, 3), (False, True), (False, True))]


def choices(run):
    """Return what a layout and a case choose, one by one."""
    layout, case = run
    kind = "hsdp" if layout.replicate > 1 else layout.strategy
    where = (layout.ranks, kind, layout.expert_parallel, (layout.exchange, layout.chunks))
    return (*where, case.routing, case.accumulation, case.recompute, case.frozen)


def pairwise(runs):
    """Return runs that together hold every pair of choices that some run holds; each time the one with most new."""
    pairs = {run: set(combinations(enumerate(choices(run)), 2)) for run in runs}
    missing, selected = set().union(*pairs.values()), []
    while missing:
        selected.append(max(runs, key=lambda run: len(pairs[run] & missing)))
        missing -= pairs[selected[-1]]
    return sorted(selected)


@functools.cache
def alone(case: Case) -> dict[str, torch.Tensor]:
    return train(Layout(), case)


def compare(layout: Layout, cases: list[Case]) -> dict[str, float]:
    """Return the largest relative error of each kind of result over the cases."""
    processes = ranks(layout.ranks, cases[0].device)
    answers = [processes.run(on_rank, layout, cases[i : i + 2]) for i in range(0, len(cases), 2)]
    found, *norms = ([result for part in ranked for result in part] for ranked in zip(*answers))
    worst: dict[str, float] = {}
    for i, case in enumerate(cases):
        want = alone(case)
        assert found[i].keys() == want.keys()
        assert {each[i] for each in norms} == {found[i]["norm"].item()}, (
            "ranks disagree on the norm"
        )
        for name, value in found[i].items():
            kind = name.split()[0]
            worst[kind] = max(
                worst.get(kind, 0.0),
                float(relative_error(torch.from_numpy(value), want[name].cpu())),
            )
    return worst


@pytest.mark.parametrize(("layout", "case"), pairwise(list(product(LAYOUTS, CASES))), ids=str)
def test_a_layout_equals_one_process(layout, case):
    """A selection of all layouts and cases that holds every pair of choices; two steps in float64."""
    worst = compare(layout, [case._replace(steps=2)])
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize(
    "layout", [Layout("fsdp", 4), Layout("fsdp", 4, 2, "all_to_all_tokens")], ids=str
)
def test_experts_that_are_fewer_than_shards_are_cut_within(layout):
    """No rank is without a part of them, and the result is the same."""
    worst = compare(layout, [Case("indivisible", 3, experts=2, steps=2)])
    assert max(worst.values()) <= 1e-12, worst
    held = ranks(4).run(numbers_of_experts, layout)
    assert len(set(held)) == 1, held


@pytest.mark.parametrize("layout", LAYOUTS[1::7], ids=str)
def test_in_float32(layout):
    worst = compare(
        layout, [Case("natural", dtype=torch.float32), Case("indivisible", 3, dtype=torch.float32)]
    )
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equality_matrix(layout):
    """Every case of a layout, and 50 steps of every routing, plain and not; prints its row of the table (-s)."""
    plain = [Case(routing, steps=50) for routing in ROUTINGS]
    mixed = [Case(routing, 3, True, i % 2 == 1, steps=50) for i, routing in enumerate(ROUTINGS)]
    worst = compare(layout, [*CASES, *plain, *mixed])
    single = compare(
        layout, [Case(r, a, dtype=torch.float32) for r, a in product(ROUTINGS, (1, 3))]
    )
    columns = " | ".join(
        f"{worst[kind]:.1e}" for kind in ("y", "grad", "norm", "auxiliary", "final")
    )
    print(f"\n| {layout} | {columns} | {max(single.values()):.1e} |")
    assert max(worst.values()) <= 1e-12, worst
    assert max(single.values()) <= 1e-5, single
