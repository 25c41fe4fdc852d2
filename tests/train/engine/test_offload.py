"""Inputs of blocks in host memory: which tensors go there, and in which order they return."""

import pytest
import torch

from tokenyard import ConfigError
from tokenyard.measure.memory import held_bytes
from tokenyard_train.engine import offload as module
from tokenyard_train.engine.evaluate import evaluate
from tokenyard_train.engine.step import train_step

from ..conftest import MODEL


@pytest.fixture
def copies(monkeypatch):
    """Return the (source, target) of every copy."""
    seen = []
    copy = module._Transfers.copy

    def noted(self, source, target):
        seen.append((source, target))
        return copy(self, source, target)

    monkeypatch.setattr(module._Transfers, "copy", noted)
    return seen


@pytest.mark.parametrize("recompute", [True, "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_inputs_of_blocks_are_copied(build, copies, monkeypatch, recompute, compiled):
    """Each goes to the host once, in order, and returns once, in reverse order."""
    if compiled:
        torch._dynamo.reset()
        monkeypatch.setattr("tokenyard_train.engine.compile.missing_compiler", lambda device: None)
        monkeypatch.setattr(torch, "compile", compile_by_tracing(torch.compile))
    run = build(
        model=MODEL | {"n_layers": 4},
        activation_checkpointing=recompute,
        activation_cpu_offload=True,
        compile=compiled,
    )
    evaluate(run, 1)
    assert not copies
    train_step(run, 0)
    assert {source.shape for source, _ in copies} == {(4, 24, 16)}
    leaving, arriving = copies[:4], copies[4:]
    hosts = [target.data_ptr() for _, target in leaving]
    assert [source.data_ptr() for source, _ in arriving] == hosts[::-1]


@pytest.mark.parametrize("recompute", [True, "selective"])
def test_the_inputs_themselves_are_freed(build, recompute):
    """On a CPU the copies take as much memory, and the last input is still on its way."""
    held = []
    for offload in (False, True):
        options = {"activation_checkpointing": recompute, "activation_cpu_offload": offload}
        run = build(model=MODEL | {"n_layers": 6}, **options)
        ids = torch.zeros(2, 24, dtype=torch.int64)
        run.model(ids)  # what the first pass caches does not count
        held.append(held_bytes(lambda run=run, ids=ids: run.model(ids), torch.device("cpu")))
    block_input = 2 * 24 * 16 * 4
    assert held[1] - held[0] < 2 * block_input


def compile_by_tracing(compile):
    return lambda function, **options: compile(function, backend="aot_eager", **options)


def test_without_recompute_it_is_refused(config):
    sentence = "activation_cpu_offload is true and activation_checkpointing is false; say true or"
    with pytest.raises(ConfigError, match=sentence):
        config(activation_cpu_offload=True)
