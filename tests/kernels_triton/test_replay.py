"""Replayed launches compute what the function computes, with the tensors of each call."""

import pytest
import torch
import triton
import triton.language as tl

from tokenyard_kernels_triton import replay
from tokenyard_kernels_triton.launching import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def add_scaled(x, y, out, scale, count, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(x + i, mask=i < count) + scale * tl.load(y + i, mask=i < count)
    tl.store(out + i, total, mask=i < count)


def add(x, y, out, scale):
    count = out.numel()
    launch(add_scaled, (triton.cdiv(count, 32),))(x, y, out, scale, count, SIZE=32)
    return out


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *tensors):
        self.calls += 1
        return self.function(*tensors)


def chain(x, y):
    """Return x + 5 y, in three launches with an intermediate, and the last half of x + 2 y."""
    first = add(x, y, torch.empty_like(x), 2)
    second = add(first, y, x.new_empty(x.shape), 2)
    return add(second, y, torch.empty_like(x), 1), first[16:], x.new_empty(0, 3)


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(replay, "_entries", type(replay._entries)())


def draw(count=32):
    return torch.randn(count, device=DEVICE)


def test_later_calls_do_not_run_the_function():
    function = Counted(chain)
    for _ in range(5):
        x, y = draw(), draw()
        total, half, empty = replay.replayed("chain", function, (x, y))
        torch.testing.assert_close(total, x + 5 * y)
        torch.testing.assert_close(half, (x + 2 * y)[16:])
        assert empty.shape == (0, 3)
    assert function.calls == 2  # the first, and the one that is recorded


def test_an_input_may_be_a_view():
    function = Counted(lambda x, y: (add(x[8:24], y, torch.empty_like(y), 3),))
    for _ in range(4):
        x, y = draw(48)[4:36], draw(16)
        (total,) = replay.replayed("view", function, (x, y))
        torch.testing.assert_close(total, x[8:24] + 3 * y)
    assert function.calls == 2


def test_addresses_of_another_alignment_are_another_key():
    function = Counted(chain)
    for start in (0, 0, 1, 1, 0, 1):
        x, y = draw(33)[start : start + 32], draw()
        torch.testing.assert_close(replay.replayed("chain", function, (x, y))[0], x + 5 * y)
    assert function.calls == 4


def test_inputs_that_share_memory_are_not_recorded():
    function = Counted(chain)
    for _ in range(3):
        x = draw()
        torch.testing.assert_close(replay.replayed("chain", function, (x, x))[0], 6 * x)
    x, y = draw(), draw()
    torch.testing.assert_close(replay.replayed("chain", function, (x, y))[0], x + 5 * y)
    torch.testing.assert_close(replay.replayed("chain", function, (y, x))[0], y + 5 * x)
    assert function.calls == 4  # three times x twice, and the one that is recorded


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (add(x, y, torch.zeros_like(x), 1),),
        lambda x, y: (add(x, (2 * y), torch.empty_like(x), 1),),
        lambda x, y: (x.clone(),),
    ],
    ids=["zeros", "a product", "a copy"],
)
def test_a_function_with_other_operators_is_never_replayed(other):
    function = Counted(other)
    for _ in range(4):
        x, y = draw(), draw()
        torch.testing.assert_close(replay.replayed("other", function, (x, y)), other(x, y))
    assert function.calls == 4


def test_memory_of_intermediates_is_reused():
    """An intermediate is freed after the last launch that reads it, as the function does."""

    def long(x, y):
        for _ in range(6):
            x = add(x, y, torch.empty_like(x), 1)
        return (x,)

    for _ in range(3):
        x, y = draw(), draw()
        torch.testing.assert_close(replay.replayed("long", long, (x, y))[0], x + 6 * y)
    (entry,) = replay._entries.values()
    freed = [slot for step in entry.program.steps for slot in step.frees]
    assert len(freed) == len(set(freed)) == 5


def test_old_keys_are_forgotten(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    for key in range(5):
        replay.replayed(key, chain, (draw(), draw()))
    assert [key[0] for key in replay._entries] == [2, 3, 4]
