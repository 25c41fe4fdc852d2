"""Steps on a GPU: as a CUDA graph, compiled, and with bfloat16 weights."""

import logging

import pytest
import torch
from rich.console import Console
from walk import QUICKSTART

from tokenyard.measure.memory import peak_bytes
from tokenyard_models.block import Block
from tokenyard_train import Callback
from tokenyard_train.commands.train import train
from tokenyard_train.config.load import load_config
from tokenyard_train.engine import steps
from tokenyard_train.engine.deterministic import deterministic
from tokenyard_train.engine.microbatch import accumulate
from tokenyard_train.engine.setup import build_setup
from tokenyard_train.engine.step import train_step
from tokenyard_train.records.metrics import TIMINGS, Metrics

pytestmark = pytest.mark.gpu

SMALL = ("max_duration=8ba", "device=cuda:0", "callbacks={}")


def losses(tmp_path, *overrides, batches=6):
    """Train some steps of the quickstart, deterministically; return the losses and the setup."""
    config = load_config(QUICKSTART, [*SMALL, f"save_folder={tmp_path}", *overrides])
    with deterministic(True):
        setup = build_setup(config, Console(quiet=True))
        setup.convert_weights()
        return [train_step(setup, batch).result.loss for batch in range(batches)], setup


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
@pytest.mark.parametrize("rows", [16, 4], ids=["one microbatch", "four"])
def test_a_graph_computes_what_is_computed_without(tmp_path, precision, rows):
    size = ("global_train_batch_size=16", f"device_train_microbatch_size={rows}")
    options = (*size, f"precision={precision}")
    eager, _ = losses(tmp_path, *options, "cuda_graph=false")
    graphed, setup = losses(tmp_path, *options, "cuda_graph=true")
    assert setup.graph.captured
    assert graphed == eager


class Reads(Callback):
    """Follows each step, so that the next one begins after its report."""

    def batch_end(self, run, record):
        pass


def test_steps_that_begin_early_give_the_same_run(tmp_path, monkeypatch):
    """With random numbers in each step, an evaluation and a save between steps."""
    keys = ("deterministic=true", "model.ffn_config.moe_jitter_eps=0.1", "cuda_graph=true")
    intervals = ("max_duration=9ba", "eval_interval=4ba", "save_interval=6ba")
    events, runs = [], []
    begin, write = steps.begin_step, Metrics.write
    monkeypatch.setattr(steps, "begin_step", lambda *a: events.append(a[1]) or begin(*a))
    monkeypatch.setattr(Metrics, "write", lambda *a: events.append("record") or write(*a))
    for callbacks in ([], [Reads()]):
        folder = tmp_path / str(len(callbacks))
        config = load_config(QUICKSTART, [*SMALL, f"save_folder={folder}", *keys, *intervals])
        train(config, Console(quiet=True), callbacks)
        lines = Metrics(folder / "metrics.jsonl").read()
        runs.append([{k: v for k, v in line.items() if k not in TIMINGS} for line in lines])
        between = events[events.index(4) + 1]
        assert between == ("record" if callbacks else 5)
        events.clear()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("recompute", ["true", "selective"])
@pytest.mark.parametrize("offload", ["false", "true"])
def test_recompute_and_offload_change_nothing(tmp_path, recompute, offload):
    options = ("cuda_graph=false", "precision=amp_bf16", "model.n_layers=6")
    keys = (f"activation_checkpointing={recompute}", f"activation_cpu_offload={offload}")
    plain, _ = losses(tmp_path, *options)
    again, _ = losses(tmp_path, *options, *keys)
    assert again == plain


@pytest.mark.parametrize("recompute", ["true", "selective"])
def test_offload_leaves_two_block_inputs_on_the_gpu(tmp_path, recompute):
    """The peak of a forward and backward pass is lower by most of the others."""
    peaks = []
    for offload in ("false", "true"):
        keys = (f"activation_checkpointing={recompute}", f"activation_cpu_offload={offload}")
        _, setup = losses(tmp_path, "cuda_graph=false", "model.n_layers=12", *keys, batches=1)
        accumulate(setup, 0)  # so that there are gradients, which would be the peak
        peaks.append(peak_bytes((lambda _, run=setup: accumulate(run, 1),), setup.device))
        config = setup.config
    tokens = int(config.device_train_microbatch_size) * config.max_seq_len
    saved = setup.model.saved_bytes_per_token(config.max_seq_len, 4)
    assert peaks[0] - peaks[1] > 8 * tokens * saved.block_input


@pytest.mark.parametrize("recompute", ["false", "true", "selective"])
def test_jitter_is_drawn_anew_in_every_replay(tmp_path, recompute):
    """A recompute draws the numbers of its forward pass again."""
    keys = (f"activation_checkpointing={recompute}", "device_train_microbatch_size=4")
    jitter = ("model.ffn_config.moe_jitter_eps=0.1",)
    eager, _ = losses(tmp_path, *jitter, "cuda_graph=false", "device_train_microbatch_size=4")
    graphed, setup = losses(tmp_path, *jitter, *keys)
    still, _ = losses(tmp_path, "device_train_microbatch_size=4")
    assert setup.graph.captured
    assert graphed == eager != still


@pytest.mark.parametrize("recompute", ["true", "selective"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_graph_with_recompute_needs_less_memory(tmp_path, recompute, compiled):
    """It computes what a graph without recompute does. Compiled kernels may round otherwise."""
    options = ("model.n_layers=12", f"compile={compiled}", "cuda_graph=true")
    plain, kept = losses(tmp_path, *options)
    again, setup = losses(tmp_path, *options, f"activation_checkpointing={recompute}")
    assert setup.graph.captured
    assert again == (plain if compiled == "false" else pytest.approx(plain, rel=5e-3))
    assert setup.graph.bytes() < 0.9 * kept.graph.bytes()


@pytest.mark.parametrize("before", [0, 3], ids=["before the capture", "after it"])
@pytest.mark.parametrize("kind", ["module", "parameter"])
def test_a_model_with_a_hook_runs_without_a_graph(tmp_path, caplog, before, kind):
    config = load_config(QUICKSTART, [*SMALL, f"save_folder={tmp_path}"])
    setup = build_setup(config, Console(quiet=True))
    for batch in range(before):
        train_step(setup, batch)
    assert setup.graph.captured == (before > 0)
    calls = []
    if kind == "module":
        setup.model.register_forward_hook(lambda *_: calls.append(1))
    else:
        weight = setup.model.embed.weight
        weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    with caplog.at_level(logging.WARNING):
        for batch in range(before, before + 3):
            train_step(setup, batch)
    assert "steps run without a CUDA graph (" in caplog.text
    assert "got a hook" in caplog.text
    assert len(calls) == 3


@pytest.mark.parametrize("always", [True, False], ids=["before the capture", "only in it"])
def test_a_model_that_waits_for_the_gpu_runs_without_a_graph(tmp_path, caplog, monkeypatch, always):
    """Random numbers are drawn as before, too."""
    jitter = ("model.ffn_config.moe_jitter_eps=0.1",)
    eager, _ = losses(tmp_path, *jitter, "cuda_graph=false")
    forward = Block.forward

    def waits(self, x, *args):
        if always or torch.cuda.is_current_stream_capturing():
            assert x.isfinite().all().item()
        return forward(self, x, *args)

    monkeypatch.setattr(Block, "forward", waits)
    with caplog.at_level(logging.WARNING):
        waited, setup = losses(tmp_path, *jitter)
    assert "steps run without a CUDA graph" in caplog.text
    assert not setup.graph.captured
    assert waited == eager


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16_master"])
def test_compiled_blocks_compute_the_same_but_for_rounding(tmp_path, precision):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, _ = losses(tmp_path, f"precision={precision}")
    compiled, _ = losses(tmp_path, f"precision={precision}", "compile=true")
    assert compiled == pytest.approx(eager, rel=5e-3)
    assert compiled != eager
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
