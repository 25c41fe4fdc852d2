"""Which runs use a CUDA graph, and what it would not see: new weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokenyard import MoE, Workload
from tokenyard.experts import TorchExperts
from tokenyard_train.engine.captured_pass import CapturedPass
from tokenyard_train.engine.cuda_graph import MicrobatchGraph, why_no_graph


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("recompute", [True, "selective"])
def test_recomputed_blocks_are_captured_and_offloaded_ones_are_not(config, model, recompute):
    run = config(activation_checkpointing=recompute).model_copy(update={"device": "cuda:0"})
    assert why_no_graph(run, model, ranks=1) is None
    offloaded = run.model_copy(update={"activation_cpu_offload": True})
    assert why_no_graph(offloaded, model, ranks=1) == "activation_cpu_offload is true"


def test_a_result_may_hold_nothing():
    """A dense model has no sums over its MoE layers."""
    captured = object.__new__(CapturedPass)
    captured.parameters, captured.gradients, captured.work = [], [], None
    captured.rng = SimpleNamespace(rewind=lambda: None)
    captured.graph = SimpleNamespace(replay=lambda: captured.result[0].add_(1))
    captured.result = (torch.zeros(()), None)
    first, nothing = captured.replay(None, add=False)
    captured.replay(None, add=False)
    assert (first.item(), nothing) == (1, None)


class Caching(TorchExperts):
    """Notes when its copies of weights are renewed."""

    weights_have_versions = True

    def renew_weight_copies(self, weights):
        self.events.append("renew")


def test_copies_of_weights_are_renewed_before_a_replay():
    moe = MoE(Workload(32, 48, 4, 2), backends={"experts": "torch"})
    kernel = moe.experts.kernel = Caching(moe.workload, None)
    kernel.events = []

    class Captured:
        def replay(self, work, add):
            kernel.events.append("replay")

    graph = MicrobatchGraph(moe)
    graph._eager_left = 0
    graph._captured = Captured()
    for _ in range(2):
        graph(None, None, add=False)
    assert kernel.events == ["renew", "replay"] * 2
