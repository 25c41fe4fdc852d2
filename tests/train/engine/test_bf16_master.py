"""Precision `bf16_master`: bfloat16 weights, float32 masters, checkpoints as in any precision."""

import pytest
import torch

from tokenyard import Targets
from tokenyard.tolerance import relative_error
from tokenyard_train.checkpoint import newest_good
from tokenyard_train.engine.microbatch import accumulate
from tokenyard_train.engine.resume import start_from
from tokenyard_train.engine.save import run_tensors
from tokenyard_train.engine.state import Position
from tokenyard_train.engine.step import train_step

from ..conftest import MODEL
from .test_resume import resumed, saved

BF16 = {"precision": "bf16_master"}


@pytest.fixture
def ready(build):
    """Build a setup, resume it if asked, and store its weights in its precision."""

    def make(**changes):
        setup = build(**changes)
        if setup.config.autoresume:
            assert resumed(setup) != Position()
        setup.convert_weights()
        return setup

    return make


def masters(setup):
    return {n: setup.optimizer.master_of(p) for n, p in setup.model.named_parameters()}


def test_weights_are_the_rounding_of_masters_that_start_as_in_float32(ready):
    run = ready(**BF16)
    for name, p in ready(precision="fp32").model.named_parameters():
        assert torch.equal(masters(run)[name], p)
    for batch in range(3):
        train_step(run, batch)
        for name, p in run.model.named_parameters():
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, masters(run)[name].bfloat16())


def test_buffers_stay_in_float32(ready):
    ffn = MODEL["ffn_config"] | {"moe_bias_update_rate": 0.01}
    run = ready(**BF16, model=MODEL | {"ffn_config": ffn})
    train_step(run, 0)
    assert [b.dtype for b in run.model.buffers()] == [torch.float32] * len(run.model.blocks)


def test_the_gradients_of_microbatches_are_summed_in_float32(ready):
    changes = {"global_train_batch_size": 8, "device_train_microbatch_size": 1}
    run = ready(**BF16, **changes)
    alone = ready(**BF16, global_train_batch_size=8)
    total = {name: 0 for name, _ in run.model.named_parameters()}
    batch = run.data.train.batch(0, 8)
    for rows in batch.split(1):
        loss = alone.model(rows[:, :-1], targets=Targets(rows[:, 1:]))
        share = alone.model.auxiliary(loss.balances, rows.shape[1] - 1, 2) / 8
        (loss.nats / run.batch_tokens + share).backward()
        for name, p in alone.model.named_parameters():
            total[name] = total[name] + p.grad.float()
            p.grad = None
    accumulate(run, 0)
    for name, p in run.model.named_parameters():
        assert relative_error(p.grad, total[name]) < 1e-6, name


def test_resuming_continues_bit_for_bit(ready):
    run = ready(**BF16)
    for batch in range(3):
        train_step(run, batch)
    saved(run, Position(batch=3))
    again = ready(**BF16, autoresume=True)
    assert train_step(again, 3).result == train_step(run, 3).result
    for (name, a), b in zip(masters(run).items(), masters(again).values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("before", ["fp32", "amp_bf16", "bf16_master"])
@pytest.mark.parametrize("after", ["fp32", "amp_bf16", "bf16_master"])
def test_a_resumed_run_may_change_its_precision(ready, before, after):
    """Masters, moments and steps are those of the checkpoint, whichever precision follows."""
    run = ready(precision=before)
    for batch in range(3):
        train_step(run, batch)
    saved(run, Position(batch=3))
    again = ready(precision=after, autoresume=True)
    tensors = run_tensors(run)
    assert all(t.dtype in (torch.float32, torch.int64) for t in tensors.values())
    for name, tensor in run_tensors(again).items():
        assert torch.equal(tensor, tensors[name]), name
    assert train_step(again, 3).result.loss == pytest.approx(
        train_step(run, 3).result.loss, rel=0.02
    )


def test_frozen_weights_have_no_master_and_are_saved_in_float32(ready):
    frozen = {"frozen": ["*.attention.*"]}
    run = ready(**BF16, **frozen)
    train_step(run, 0)
    name = "blocks.0.attention.qkv.weight"
    parameter = run.model.get_parameter(name)
    assert parameter not in run.optimizer.state
    assert run_tensors(run)[f"model.{name}"].dtype == torch.float32
    saved(run, Position(batch=1))
    again = ready(**BF16, **frozen, autoresume=True)
    assert torch.equal(again.model.get_parameter(name), parameter)


def test_a_run_that_starts_from_a_checkpoint_has_its_masters(ready, build, tmp_path):
    run = ready()
    train_step(run, 0)
    saved(run)
    other = build(**BF16, save_folder=str(tmp_path / "other"))
    start_from(other.model, str(newest_good(run.folder)), other.config)
    other.convert_weights()
    for name, p in run.model.named_parameters():
        assert torch.equal(masters(other)[name], p)
