"""Which runs use a CUDA graph, and what it would not call or see: later hooks, new weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokenyard import MoE, Workload
from tokenyard.experts import TorchExperts
from tokenyard_train.engine.captured_pass import CapturedPass
from tokenyard_train.engine.cuda_graph import MicrobatchGraph, why_no_graph


def hook(*_):
    return None


@pytest.fixture
def model():
    """A model with a hook of its own, which is part of its forward pass."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_forward_hook(hook)
    return model


def test_hooks_of_the_model_itself_are_part_of_its_forward_pass(model):
    assert MicrobatchGraph(model)._hooked() is None


@pytest.mark.parametrize(
    "register",
    [
        lambda model: model[1].register_forward_hook(hook),
        lambda model: model[1].register_forward_pre_hook(hook),
        lambda model: model[1].register_full_backward_hook(hook),
        lambda model: model[1].weight.register_hook(hook),
        lambda model: model[1].weight.register_post_accumulate_grad_hook(hook),
    ],
    ids=["forward", "pre", "backward", "tensor", "gradient"],
)
def test_a_later_hook_is_noticed_until_it_is_removed(model, register):
    graph = MicrobatchGraph(model)
    handle = register(model)
    assert graph._hooked() == "1 got a hook, which a graph does not call"
    handle.remove()
    assert graph._hooked() is None


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
