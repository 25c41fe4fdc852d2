"""Moments in bfloat16 and in 8 bits."""

import math

import pytest
import torch
from torch import nn

from tokenyard import ConfigError, ShardingReport
from tokenyard.tolerance import relative_error
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.commands.memory import estimate
from tokenyard_train.config.optimizer import OptimizerConfig
from tokenyard_train.engine.moments import (
    SCALE,
    block_size,
    new_moment,
    quantize,
    read_moment,
    write_moment,
)
from tokenyard_train.engine.optimizer import build_optimizer
from tokenyard_train.engine.save import run_tensors
from tokenyard_train.engine.step import train_step

from ..conftest import MODEL
from .test_resume import check_continues_bit_for_bit, resumed, saved

WIDE = {"model": MODEL | {"d_model": 64}}
NAMES = ["adamw", "muon"]


def published_map(signed):
    """Return the dynamic map as bitsandbytes and torchao create it."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        means = 10 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += [*means.tolist(), *(-means if signed else means[:0]).tolist()]
    return torch.tensor(values).sort().values


@pytest.mark.parametrize(("name", "signed"), [("exp_avg", True), ("exp_avg_sq", False)])
def test_codes_are_those_of_the_nearest_value_of_the_published_map(name, signed):
    table = published_map(signed)
    assert len(table) == 256
    exact = torch.rand(8, 512) ** 8
    if signed:
        exact *= torch.randn_like(exact).sign()
    exact[0, :256] = 0
    state = new_moment(name, torch.empty(8, 512), "8bit")
    assert (state[name].dtype, state[name + SCALE].shape) == (torch.uint8, (8, 2))
    assert not read_moment(state, name).any()
    write_moment(state, name, exact)
    scales = exact.view(8, 2, 256).abs().amax(-1, keepdim=True)
    x = (exact.view(8, 2, 256) / scales.clamp(min=1e-30)).flatten()
    nearest = table[(x[:, None] - table).abs().argmin(1)]
    if not signed:
        nearest = torch.where((x > 0) & (nearest == 0), table[1], nearest)
    want = (nearest.view(8, 2, 256) * scales).view(8, 512)
    assert torch.allclose(read_moment(state, name), want, rtol=1e-6, atol=0)


def test_every_code_is_read_as_it_was_written():
    """Blocks whose largest number is the value 1 of the map do not change."""
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = published_map(signed)[None]
        state = new_moment(name, values, "8bit")
        write_moment(state, name, values)
        assert torch.allclose(read_moment(state, name), values, rtol=1e-6, atol=0)
        assert len(quantize(values, signed)[0].unique()) == 256


@pytest.mark.parametrize(
    ("shape", "block"),
    [((4, 512), 256), ((2, 4, 768), 256), ((4, 2880), 64), ((4, 96), None), ((512,), None)],
)
def test_blocks_divide_rows(shape, block):
    assert block_size(torch.empty(shape)) == block


def test_a_second_moment_above_zero_is_never_stored_as_zero():
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([1.0, 1e-30])
    codes, _ = quantize(x, signed=False)
    assert codes[0, :3].tolist() == [255, 1, 0]


@pytest.mark.parametrize(("moments", "tolerance"), [("bf16", 5e-3), ("8bit", 5e-2)])
def test_steps_follow_adamw_but_for_the_rounding_of_moments(moments, tolerance):
    model = nn.Linear(128, 8)
    reference = nn.Linear(128, 8)
    reference.load_state_dict(model.state_dict())
    before = model.weight.detach().clone()
    options = {"name": "adamw", "lr": 0.01}
    optimizer = build_optimizer(OptimizerConfig(**options, moments=moments), model)
    exact = build_optimizer(OptimizerConfig(**options), reference)
    for _ in range(10):
        gradient = torch.randn(8, 128)
        for module in (model, reference):
            module.weight.grad = gradient.clone()
        optimizer.step(scale=torch.tensor(0.5))
        exact.step(scale=torch.tensor(0.5))
    change = model.weight.detach() - before
    assert 0 < relative_error(change, reference.weight.detach() - before) < tolerance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moments", ["bf16", "8bit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_resuming_continues_bit_for_bit(build, name, moments, precision):
    optimizer = {"name": name, "lr": 0.01, "moments": moments}
    check_continues_bit_for_bit(build, WIDE | {"optimizer": optimizer, "precision": precision})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_a_scale_that_is_not_finite_changes_nothing(build, name, moments):
    run = build(**WIDE, optimizer={"name": name, "moments": moments})
    train_step(run, 0)
    before = {key: tensor.clone() for key, tensor in run_tensors(run).items()}
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    run.optimizer.step(scale=torch.tensor(math.nan))
    for key, tensor in run_tensors(run).items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_the_state_in_memory_is_exact(build, name, moments):
    changes = {"optimizer": {"name": name, "moments": moments}, "precision": "bf16_master"}
    run = build(**WIDE, **changes)
    estimated = estimate(run.config, run.model, ShardingReport({}, 0)).optimizer
    run.convert_weights()
    train_step(run, 0)
    states = [run.optimizer.state_of(p) for p in run.model.parameters()]
    held = [t for state in states for key, t in state.items() if key != "step"]
    assert estimated == sum(t.nbytes for t in held)


def test_eight_bits_take_a_little_more_than_a_byte():
    """Of a parameter with a float32 master: 2 + 4 + 2 * (1 + 4 / 256) bytes."""
    model = nn.Linear(256, 16, bias=False)
    optimizer = build_optimizer(OptimizerConfig(moments="8bit"), model)
    assert optimizer.moment_bytes() == 2 * (256 + 4) * 16


def test_a_resumed_run_keeps_its_moments(build):
    saved(build(**WIDE))
    with pytest.raises(CheckpointError, match=r"optimizer.moments is '8bit', but"):
        resumed(build(**WIDE, optimizer={"moments": "8bit"}, autoresume=True))


def test_bfloat16_refuses_a_decay_that_it_would_round_away(config):
    with pytest.raises(
        ConfigError, match=r"moments is bf16, whose rounding undoes a decay by 0.99"
    ):
        config(optimizer={"moments": "bf16", "betas": [0.9, 0.999]})
