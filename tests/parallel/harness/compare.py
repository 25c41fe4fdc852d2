"""Comparison of a layout with one process."""

from __future__ import annotations

import functools
from itertools import combinations, product

import torch
from torch import Tensor

from harness.equality import Case, Layout, train, train_on_rank
from tokenyard.testing import ranks
from tokenyard.tolerance import relative_error

ROUTINGS = ("natural", "one_expert", "idle_rank", "empty_batch", "every_expert", "indivisible")
BATCH = 2  # cases that ranks run at a time: their timeout counts per call


@functools.cache
def single_process(case: Case) -> dict[str, Tensor]:
    return train(Layout(), case)


def compare(layout: Layout, cases: list[Case]) -> dict[str, float]:
    """Return the largest relative error of each kind of result over the cases."""
    pool = ranks(layout.ranks, cases[0].device)
    batches = [cases[i : i + BATCH] for i in range(0, len(cases), BATCH)]
    answers = [pool.run(train_on_rank, layout, batch) for batch in batches]
    # results by rank; rank 0 has all of them, and the others have norms
    results, *norms = ([x for batch in by_rank for x in batch] for by_rank in zip(*answers))
    worst: dict[str, float] = {}
    for i, case in enumerate(cases):
        expected = single_process(case)
        assert results[i].keys() == expected.keys()
        norm = results[i]["norm"].item()
        assert all(other[i] == norm for other in norms), "ranks disagree on the norm"
        for name, value in results[i].items():
            error = float(relative_error(torch.from_numpy(value), expected[name].cpu()))
            kind = name.split()[0]
            worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


Run = tuple[Layout, Case]


def choices(run: Run) -> tuple[object, ...]:
    """Return the value of every option of a run."""
    layout, case = run
    exchange = (layout.exchange, layout.chunks)
    of_layout = (layout.ranks, layout.kind, layout.expert_parallel, exchange)
    of_step = (case.routing, case.accumulation, case.recompute, case.frozen, case.lora)
    return (*of_layout, *of_step, case.muon, case.moments)


def pairwise(layouts: list[Layout], cases: list[Case]) -> list[Run]:
    """Return runs that cover every pair of option values; each adds as many pairs as possible."""
    runs = list(product(layouts, cases))
    pairs = {run: set(combinations(enumerate(choices(run)), 2)) for run in runs}
    missing = set().union(*pairs.values())
    selected: list[Run] = []
    while missing:
        selected.append(max(runs, key=lambda run: len(pairs[run] & missing)))
        missing -= pairs[selected[-1]]
    return sorted(selected)
