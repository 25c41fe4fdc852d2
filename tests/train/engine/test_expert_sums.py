"""Expert kernels that add to the gradients of their weights, over several microbatches."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tokenyard import moe_layers
from tokenyard.experts import TorchExperts
from tokenyard.tolerance import relative_error
from tokenyard_train.engine import cuda_graph
from tokenyard_train.engine.captured_pass import CapturedPass
from tokenyard_train.engine.expert_sums import ExpertSums
from tokenyard_train.engine.microbatch import accumulate
from tokenyard_train.engine.step import train_step

TORCH = {"backends": {"experts": "torch"}}
WEIGHTS = ("ffn.experts.up", "ffn.experts.down")


@pytest.fixture
def ready(build, monkeypatch):
    """Build a run whose experts are computed by the `torch` backend, with converted weights."""

    def ready(**changes):
        setup = build(**TORCH, **changes)
        setup.convert_weights()
        return setup

    return ready


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel that add to sums."""
    calls = []
    adding = TorchExperts.with_sums

    def with_sums(self, *args):
        calls.append(self)
        return adding(self, *args)

    monkeypatch.setattr(TorchExperts, "with_sums", with_sums)
    return calls


def gradients(setup, without=False):
    """Return the gradients of a batch; `without` kernels that add."""
    if without:
        setup.sums.layers.clear()
    accumulate(setup, 0)
    return {name: p.grad for name, p in setup.model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "amp_bf16"},
        {"precision": "bf16_master"},
        {"precision": "fp32", "activation_checkpointing": True},
        {"precision": "fp32", "activation_checkpointing": "selective"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_kernels_add_what_autograd_adds(ready, calls, changes):
    """Layers of both blocks add in each of the 4 microbatches, also where a pass is repeated."""
    got = gradients(ready(device_train_microbatch_size=1, **changes))
    assert len(calls) >= 8
    calls.clear()
    want = gradients(ready(device_train_microbatch_size=1, **changes), without=True)
    assert not calls
    for name, gradient in want.items():
        assert got[name].dtype == torch.float32
        assert relative_error(got[name], gradient) < 1e-6, name


def test_one_microbatch_needs_no_sum(ready, calls):
    run = ready(precision="bf16_master")
    for gradient in gradients(run).values():
        assert gradient.dtype == torch.bfloat16
    assert not calls


def test_every_step_starts_from_zero(ready, calls):
    """With a graph, the sums of all steps are in the same memory."""
    run = ready(device_train_microbatch_size=2)
    kept = ready(device_train_microbatch_size=2)
    kept.sums.keep = True
    up = moe_layers(kept.model)[0].experts.up
    with kept.sums.adding():
        address = up.grad.data_ptr()
    for batch in range(2):
        assert train_step(run, batch).result == train_step(kept, batch).result
        assert moe_layers(run.model)[0].experts.gradient_sums is None
    accumulate(kept, 2)
    assert up.grad.data_ptr() == address


def test_nothing_is_added_while_paused(ready, calls):
    run = ready(device_train_microbatch_size=2)
    with run.sums.adding(), run.sums.paused():
        assert [experts.gradient_sums for experts in run.sums.layers] == [None, None]


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_weights_with_a_hook_are_left_to_autograd(ready, calls, kind):
    run = ready(device_train_microbatch_size=2)
    seen = []
    first = moe_layers(run.model)[0].experts
    getattr(first.up, kind)(lambda _: seen.append(kind))
    accumulate(run, 0)
    assert len(seen) == 2
    assert first.kernel not in calls
    assert len(calls) == 2


def test_several_ranks_sum_each_gradient(ready, calls):
    run = ready()
    assert len(ExpertSums(run.model, 1, keep=False).layers) == 2
    assert not ExpertSums(run.model, 2, keep=False).layers


def test_frozen_weights_have_no_sum(ready, calls):
    run = ready(device_train_microbatch_size=2, frozen=["blocks.0.ffn.experts.up"])
    accumulate(run, 0)
    assert moe_layers(run.model)[0].experts.up.grad is None
    assert moe_layers(run.model)[0].experts.kernel not in calls
    assert len(calls) == 2


class FakeCapture(CapturedPass):
    """A captured graph on a CPU: what is captured changes nothing, and is run again by a replay."""

    def __init__(self, parameters, work):
        self.parameters = parameters
        self.work = tree_map_only(torch.Tensor, torch.clone, work)
        self.rng = SimpleNamespace(rewind=lambda: None)

    def warm_up(self, run, context):
        before = [p.grad.clone() for p in self.parameters if p.grad is not None]
        own = [p.grad for p in self.parameters if p.grad is not None]
        self._clear_gradients()
        with context():
            run(self.work)
        assert all(torch.equal(new, old) for new, old in zip(own, before, strict=True))
        self.unchanged = [*zip(own, before)]

    def capture(self, run):
        self._clear_gradients()
        self.result = run(self.work)
        self.gradients = [p.grad for p in self.parameters]
        for new, old in self.unchanged:
            new.copy_(old)
        self.graph = SimpleNamespace(replay=lambda: self.run_again(run))

    def run_again(self, run):
        own = [p.grad for p in self.parameters]
        self._clear_gradients()
        self.result = run(self.work)
        for p, static, gradient in zip(self.parameters, self.gradients, own):
            if static is not None:
                static.copy_(p.grad)
            p.grad = gradient


def test_a_pass_before_the_capture_adds_nothing(ready, calls, monkeypatch):
    """It runs in the second microbatch, when the sums are not zero; replays add to them."""
    monkeypatch.setattr(cuda_graph, "CapturedPass", FakeCapture)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    plain = ready(device_train_microbatch_size=1)
    built = ready(device_train_microbatch_size=1)
    built.sums.keep = True
    graph = cuda_graph.MicrobatchGraph(built.model, built.sums.paused)
    graphed = dataclasses.replace(built, graph=graph)
    for batch in range(2):
        assert train_step(graphed, batch).result.loss == train_step(plain, batch).result.loss
    assert graph.captured
    for one, other in zip(graphed.model.parameters(), plain.model.parameters()):
        assert relative_error(one.detach(), other.detach()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("precision", ["bf16_master", "amp_bf16"])
def test_a_cuda_graph_adds(build, backend, precision):
    """It is captured within the first batch, when the sums are not zero."""
    changes = {"device": "cuda:0", "backends": {"experts": backend}, "precision": precision}
    runs = []
    for graph, without in ((True, False), (False, False), (False, True)):
        run = build(**changes, device_train_microbatch_size=1, cuda_graph=graph)
        run.convert_weights()
        runs.append(run)
        assert all(experts.can_add for experts in run.sums.layers)
        if without:
            run.sums.layers.clear()
    for batch in range(2):
        for run in runs:
            accumulate(run, batch)
        graphed, eager, by_autograd = ([p.grad for p in run.model.parameters()] for run in runs)
        assert runs[0].graph.captured
        for one, other, wanted in zip(graphed, eager, by_autograd):
            assert one.dtype == torch.float32
            assert relative_error(one, other) < 1e-5
            assert relative_error(one, wanted) < 1e-2
        for run in runs:
            run.optimizer.zero_grad(set_to_none=True)
