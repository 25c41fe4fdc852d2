"""Ranks whose microbatches have collectives: either all of them replay a CUDA graph, or none."""

import contextlib
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tokenyard.testing import ranks
from tokenyard_train.engine import cuda_graph
from tokenyard_train.engine.cuda_graph import MicrobatchGraph

MICROBATCHES = 4
RNG = {"get_rng_state": lambda device: None, "set_rng_state": lambda state, device: None}


class FakeCapture(cuda_graph.CapturedPass):
    """A capture on a CPU: nothing runs in it, and a replay runs the function."""

    fails = ""  # the phase in which this rank is out of memory

    def __init__(self, parameters, work):
        self.warm = False

    def warm_up(self, run, context):
        if self.fails == "pass before":
            raise torch.OutOfMemoryError("out of memory")
        run(torch.zeros(()))
        self.warm = True

    def capture(self, run):
        if self.fails == "capture":
            raise torch.OutOfMemoryError("out of memory")
        self.run = run

    def replay(self, work, add):
        return self.run(work)


def any_rank(flag):
    count = torch.tensor(float(flag))
    dist.all_reduce(count)
    return bool(count)


def states_with_a_later_hook():
    """Return whether this rank replays, and whether ranks agreed to, before and after a hook.

    Rank 1 alone gets it.
    """
    FakeCapture.fails = ""
    model = nn.Linear(1, 1)
    graph = MicrobatchGraph(model, contextlib.nullcontext, any_rank)
    states = []
    with patch.object(cuda_graph, "CapturedPass", FakeCapture), patch.multiple(torch.cuda, **RNG):
        for hooked in (False, False, True):
            if hooked and dist.get_rank() == 1:
                model.register_forward_hook(lambda *_: None)
            graph(torch.zeros(()), lambda work: dist.all_reduce(work), add=False)
            states.append((graph.captured, graph.agreed))
    return states


def sums_over_ranks(event):
    """Sum numbers over ranks in some microbatches, with an event on rank 1; return sums, captured.

    The event is a hook that the model gets, or the phase in which the rank is out of memory.
    """
    last = dist.get_rank() == 1
    model = nn.Linear(1, 1)
    graph = MicrobatchGraph(model, contextlib.nullcontext, any_rank)
    if last and event == "hook":
        model.register_forward_hook(lambda *_: None)
    FakeCapture.fails = event if last else ""

    def run(work):
        dist.all_reduce(work)
        return work.item()

    with patch.object(cuda_graph, "CapturedPass", FakeCapture), patch.multiple(torch.cuda, **RNG):
        sums = [graph(torch.tensor(float(i)), run, add=False) for i in range(MICROBATCHES)]
    return sums, graph.captured


@pytest.mark.parametrize("event", ["none", "hook", "capture"])
def test_a_rank_that_cannot_capture_keeps_all_others_from_it(event):
    expected = [2.0 * i for i in range(MICROBATCHES)], event == "none"
    assert ranks(2).run(sums_over_ranks, event) == [expected, expected]


def test_ranks_agree_after_a_hook_on_one_of_them():
    """They launch steps at the same times, or a rank would wait for others that save."""
    first, last = ranks(2).run(states_with_a_later_hook)
    assert first == [(False, False), (True, True), (True, True)]
    assert last == [(False, False), (True, True), (False, True)]


def test_a_rank_out_of_memory_before_the_capture_fails_as_without_a_graph(monkeypatch):
    """Other ranks are in the collectives of that pass already."""
    graph = MicrobatchGraph(nn.Linear(1, 1), contextlib.nullcontext, any_rank)
    monkeypatch.setattr(cuda_graph, "CapturedPass", FakeCapture)
    monkeypatch.setattr(FakeCapture, "fails", "pass before")
    with patch.multiple(torch.cuda, **RNG), pytest.raises(torch.OutOfMemoryError):
        graph._capture(None, lambda work: None)
