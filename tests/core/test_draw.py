"""Random numbers for parameters, the same for every sharding."""

import math

import pytest
import torch

from tokenyard import draw
from tokenyard.draw import draw_normal, draw_rows, draws_on_device


@pytest.mark.parametrize(
    "block",
    [
        (slice(0, 3),),
        (slice(3, 6),),
        (slice(1, 2), slice(4, 9)),
        (slice(None), slice(0, 5)),
        (slice(5, 6), slice(9, 10)),
        (slice(2, 4), slice(None), slice(3, 8)),
        (slice(6, 6),),
    ],
)
@pytest.mark.parametrize("stripe", [8, 24, 1 << 15])  # a row, three, more than all
def test_a_rank_draws_its_own_rows_of_packed_experts(block, stripe, monkeypatch):
    monkeypatch.setattr(draw, "_STRIPE", stripe)
    whole = torch.empty(6, 10, 8)
    draw_rows(whole, 7, "up", 0.1)
    first = [s.start or 0 for s in block] + [0] * (3 - len(block))
    local = torch.full_like(whole[block], math.nan)
    draw_rows(local, 7, "up", 0.1, whole.shape, first)
    assert torch.equal(local, whole[block])


def test_seed_name_and_row_all_matter(monkeypatch):
    monkeypatch.setattr(draw, "_STRIPE", 64)
    draws = [torch.empty(2, 64) for _ in range(3)]
    for tensor, (seed, name) in zip(draws, [(1, "a"), (2, "a"), (1, "b")]):
        draw_rows(tensor, seed, name, 1.0)
    rows = [row for tensor in draws for row in tensor]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_lower_precision_holds_the_same_numbers_rounded():
    full = torch.empty(4, 32)
    half = torch.empty(4, 32, dtype=torch.bfloat16)
    draw_rows(full, 3, "w", 1.0)
    draw_rows(half, 3, "w", 1.0)
    assert torch.equal(full.to(torch.bfloat16), half)


def test_a_parameter_is_drawn_by_its_name_without_wrappers():
    plain, wrapped = (torch.nn.Parameter(torch.empty(4, 32)) for _ in range(2))
    draw_normal(plain, 3, "blocks.0.up", 0.5)
    draw_normal(wrapped, 3, "blocks.0._checkpoint_wrapped_module.up", 0.5)
    assert torch.equal(plain, wrapped)
    assert plain.std().item() == pytest.approx(0.5, rel=0.3)


def test_a_benchmark_draws_on_the_device_with_the_same_seed_and_spread():
    fast, again = (torch.empty(64, 64, dtype=torch.bfloat16) for _ in range(2))
    with draws_on_device():
        draw_normal(fast, 3, "up", 0.5)
        draw_normal(again, 3, "up", 0.5)
    assert torch.equal(fast, again)
    assert fast.float().std().item() == pytest.approx(0.5, rel=0.1)
