"""The memory estimate against what autograd really saves."""

import pytest
import torch

from tokenyard import ShardingReport, moe_layers
from tokenyard.measure.memory import held_bytes
from tokenyard_train.commands.check import _backend_rows
from tokenyard_train.commands.memory import estimate, offloaded_bytes, saved_by_blocks
from tokenyard_train.engine.build_model import build_model
from tokenyard_train.engine.precision import COMPUTE_DTYPES, narrow

from ..conftest import MODEL

LARGER = MODEL | {
    "d_model": 64,
    "n_layers": 3,
    "ffn_config": MODEL["ffn_config"] | {"ffn_hidden_size": 96},
}

ALONE = ShardingReport({}, 0)


MODELS = [
    LARGER,
    {"name": "mixtral", "size": "tiny", "num_hidden_layers": 3},
    {"name": "qwen3_moe", "size": "tiny"},
    {"name": "mpt_causal_lm", "size": "tiny", "ffn_config": {"ffn_type": "mptglu"}},
    {
        "name": "mpt_causal_lm",
        "size": "tiny",
        "ffn_config": {"ffn_type": "mb_dmoe", "shared_expert": True},
    },
]


NAMES = ["dbrx", "mixtral", "qwen3_moe", "dense", "shared expert"]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_what_is_saved_for_the_backward_pass_is_within_a_tenth(build, model, precision):
    run = build(model=model, precision=precision, max_seq_len=128, global_train_batch_size=8)
    run.convert_weights()
    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    rows = run.data.train.batch(0, 8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), run.precision():
        output = run.model(rows[:, :-1])
    memory = estimate(run.config, run.model, ALONE)
    assert output.logits.requires_grad
    assert memory.activations + memory.copies == pytest.approx(sum(saved.values()), rel=0.1)


@pytest.mark.parametrize("recompute", [True, "selective"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_what_recompute_keeps_is_within_a_tenth(build, model, precision, recompute):
    run = build(
        model=model,
        precision=precision,
        activation_checkpointing=recompute,
        max_seq_len=128,
        global_train_batch_size=8,
    )
    run.convert_weights()
    rows = run.data.train.batch(0, 8)
    width = COMPUTE_DTYPES[precision].itemsize
    with run.precision():
        held = held_bytes(lambda: run.model(rows[:, :-1]), torch.device("cpu"))
    held -= rows[:, :-1].numel() * run.model.vocab_size * width  # logits
    memory = estimate(run.config, run.model, ALONE)
    # the backward pass computes a block, and copies its experts, again
    saved = run.model.saved_bytes_per_token(128, width)
    later = saved_by_blocks(run.config, saved)[1] * 8 * 128
    if memory.copies:
        later += width * max(expert_numel(block) for block in run.model.blocks)
    assert memory.activations + memory.copies - later == pytest.approx(held, rel=0.1)


def test_a_gpu_holds_two_block_inputs_with_offload(config):
    changes = {"model": LARGER | {"n_layers": 20}, "activation_checkpointing": True}
    _, model = build_model(config(**changes))
    plain = config(**changes).model_copy(update={"device": "cuda:0"})
    offloaded = plain.model_copy(update={"activation_cpu_offload": True})
    inputs = 4 * 24 * 4 * 64  # bytes of one
    saved = (estimate(run, model, ALONE).activations for run in (plain, offloaded))
    assert next(saved) - next(saved) == 18 * inputs
    assert offloaded_bytes(offloaded, model) == 20 * inputs
    assert offloaded_bytes(plain, model) == 0
    on_cpu = config(**changes, activation_cpu_offload=True)
    assert estimate(on_cpu, model, ALONE) == estimate(config(**changes), model, ALONE)


def expert_numel(block: torch.nn.Module) -> int:
    return sum(p.numel() for moe in moe_layers(block) for p in moe.experts.parameters())


def test_state_is_exact(config):
    _, model = build_model(config())
    count = sum(p.numel() for p in model.parameters())
    memory = estimate(config(), model, ALONE)
    assert (memory.parameters, memory.gradients, memory.optimizer, memory.copies) == (
        4 * count,
        4 * count,
        8 * count,
        0,
    )
    assert estimate(config(precision="amp_bf16"), model, ALONE).copies == 2 * count


def test_state_of_bfloat16_weights_is_exact(config):
    """16 bytes a parameter; gradients of several microbatches take 4 instead of 2."""
    _, model = build_model(config())
    count = sum(p.numel() for p in model.parameters())
    for rows, width in ((4, 2), (1, 4)):
        changes = {"precision": "bf16_master", "device_train_microbatch_size": rows}
        memory = estimate(config(**changes), model, ALONE)
        state = (memory.parameters, memory.gradients, memory.optimizer, memory.copies)
        assert state == (2 * count, width * count, 12 * count, 0)
    narrow(model)  # as `check` does
    assert estimate(config(**changes), model, ALONE).optimizer == 12 * count


def test_a_graph_keeps_the_gradient_of_a_microbatch(config):
    _, model = build_model(config())
    count = sum(p.numel() for p in model.parameters())
    changes = {"device_train_microbatch_size": 1}
    run = config(**changes).model_copy(update={"device": "cuda:0"})
    assert estimate(run, model, ALONE).gradients == 8 * count
    without = run.model_copy(update={"cuda_graph": False})
    assert estimate(without, model, ALONE).gradients == 4 * count


def test_a_graph_keeps_no_gradient_that_a_kernel_adds_to_the_sum(config):
    adding = config(device_train_microbatch_size=1, backends={"experts": "torch"})
    _, model = build_model(adding)
    count = sum(p.numel() for p in model.parameters())
    layers = [moe.experts for moe in moe_layers(model)]
    added = sum(p.numel() for experts in layers for p in (experts.up, experts.down))
    run = adding.model_copy(update={"device": "cuda:0"})
    assert estimate(run, model, ALONE).gradients == 8 * count - 4 * added


def test_recomputing_saves_most_activations(config):
    changes = {"model": LARGER | {"n_layers": 20}}
    _, model = build_model(config(**changes))
    plain, recomputed = (
        estimate(config(**changes, activation_checkpointing=flag), model, ALONE).activations
        for flag in (False, True)
    )
    assert recomputed < plain / 4


class Frugal:
    """A kernel that saves 3 bytes a row, and keeps copies of the weights."""

    weights_have_versions = True

    def saved_bytes_per_row(self, width):
        return 3

    def weight_copy_bytes(self, numbers):
        return 2 * numbers

    def advice(self, keeps_copies):
        return f"save: nothing would save 3 bytes, {keeps_copies}"


def test_check_says_what_a_kernel_saves_and_keeps(config):
    run = config()
    _, model = build_model(run)
    before = estimate(run, model, ALONE)
    layers = moe_layers(model)
    assert "experts save" not in dict(_backend_rows(run, layers[0]))
    for moe in layers:
        moe.experts.kernel = Frugal()
    rows = dict(_backend_rows(run, layers[0]))
    usual = 2 * 4 * 32  # K * b * U
    assert rows["experts save"] == f"6 bytes a token and layer, {usual - 6} fewer"
    assert rows["experts keep"].startswith("copies of a layer's weights, ")
    assert rows["experts could"] == "save: nothing would save 3 bytes, True"
    after = estimate(run, model, ALONE)
    numbers = sum(p.numel() for moe in layers for p in moe.experts.parameters())
    tokens = int(run.device_train_microbatch_size) * run.max_seq_len
    assert after.copies - before.copies == 2 * numbers
    assert before.activations - after.activations == tokens * len(layers) * (usual - 6)
