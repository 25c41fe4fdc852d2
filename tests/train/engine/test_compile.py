"""Compiled blocks are one graph for all blocks; what cannot be compiled or captured is named."""

import functools
import logging

import pytest
import torch

from tokenyard import ConfigError
from tokenyard_train.engine import compile as module
from tokenyard_train.engine.evaluate import evaluate
from tokenyard_train.engine.step import train_step

from ..conftest import MODEL

MODELS = {
    "dbrx": MODEL | {"n_layers": 3},
    "mixtral": {"name": "mixtral", "size": "tiny"},
    "qwen3_moe": {"name": "qwen3_moe", "size": "tiny"},
    "olmoe": {"name": "olmoe", "size": "tiny"},
    "mpt": {"name": "mpt_causal_lm", "size": "tiny", "ffn_config": {"ffn_type": "mb_dmoe"}},
    "llama": {"name": "llama", "size": "tiny"},
}


@pytest.fixture
def traced(monkeypatch):
    """Compile by AOT autograd alone: no C++ compiler is needed, and it takes a second."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(module, "missing_compiler", lambda device: None)
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "precision"), [("dbrx", "fp32"), *((name, "amp_bf16") for name in MODELS)]
)
def test_all_blocks_of_a_model_are_one_graph(build, traced, name, precision):
    changes = {"model": MODELS[name], "precision": precision}
    eager = build(**changes)
    compiled = build(**changes, compile=True)
    want = train_step(eager, 0).result
    got = train_step(compiled, 0).result
    assert got.loss == pytest.approx(want.loss, rel=5e-3)
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=5e-2)
    train_step(compiled, 1)
    assert traced["stats"]["unique_graphs"] == 1
    assert not traced["graph_break"]


def assert_near(model, other):
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [True, "selective"])
@pytest.mark.parametrize("offload", [False, True])
def test_evaluation_and_recomputed_blocks_add_no_graph(build, traced, recompute, offload):
    keys = {"activation_checkpointing": recompute, "activation_cpu_offload": offload}
    run = build(compile=True, **keys)
    plain = build()
    assert train_step(run, 0).result.loss == train_step(plain, 0).result.loss
    assert_near(run.model, plain.model)
    evaluate(run, 1)
    train_step(run, 1)
    assert traced["stats"]["unique_graphs"] == 1


def test_compiled_blocks_add_to_sums_of_gradients(build, traced):
    """All microbatches of all steps are one graph, in which the kernels add."""
    changes = {"backends": {"experts": "torch"}, "device_train_microbatch_size": 1}
    run = build(**changes, compile=True)
    plain = build(**changes)
    for batch in range(2):
        want = train_step(plain, batch).result
        assert train_step(run, batch).result.loss == pytest.approx(want.loss, rel=1e-5)
    assert_near(run.model, plain.model)
    assert traced["stats"]["unique_graphs"] == 1
    assert not traced["graph_break"]


def test_without_a_compiler_blocks_run_eagerly(build, monkeypatch, caplog):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        run = build(compile=True)
    assert "compile is true, but no C compiler is found (tried c++, g++, clang++)" in caplog.text
    train_step(run, 0)


def test_a_graph_is_for_a_gpu(build):
    assert build().graph is None
    with pytest.raises(ConfigError, match="cuda_graph is true, and device is cpu; give auto"):
        build(cuda_graph=True)
