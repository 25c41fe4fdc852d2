"""Muon against ``torch.optim.Muon``, matrix by matrix, and its place in a run."""

import math

import pytest
import torch
from torch import nn

from tokenyard import ConfigError, ShardingReport
from tokenyard.tolerance import relative_error
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.commands.memory import estimate
from tokenyard_train.config.optimizer import OptimizerConfig
from tokenyard_train.engine.muon import Muon
from tokenyard_train.engine.optimizer import Optimizer, build_optimizer
from tokenyard_train.engine.save import run_tensors
from tokenyard_train.engine.schedule import ScheduleSteps, learning_rate
from tokenyard_train.engine.state import Position
from tokenyard_train.engine.step import train_step

from .test_resume import resumed, saved

MUON = {"name": "muon", "lr": 0.01, "weight_decay": 0.1}
STACK = (3, 10, 6)
ROWS = (4, 6)  # of the two matrices in each of the stack


def parts(x, rows):
    """Return the matrices of a stack, as tensors of their own."""
    return [piece.clone() for matrix in x for piece in matrix.split(rows)]


def steps(dtype, adjust_lr, stack=STACK, rows=ROWS, device="cpu"):
    """Take five steps with ours and with torch's; return the matrices of both."""
    ours = nn.Parameter(torch.randn(stack, dtype=dtype, device=device))
    theirs = [nn.Parameter(piece) for piece in parts(ours.detach(), rows)]
    rule = Muon(0.95, 0.1, 5, adjust_lr, {ours: rows})
    optimizer = Optimizer([{"params": [ours], "lr": 0.02, "initial_lr": 0.02, "rule": rule}])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr)
    for _ in range(5):
        ours.grad = torch.randn(stack, dtype=dtype, device=device)
        for matrix, gradient in zip(theirs, parts(ours.grad, rows)):
            matrix.grad = gradient / 2
        optimizer.step(scale=torch.tensor(0.5, device=device))
        reference.step()
    return parts(ours.detach(), rows), theirs


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_it_equals_torch_in_float64(monkeypatch, adjust_lr):
    """torch's iteration runs in bfloat16; here it computes in float64 as well."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    for ours, theirs in zip(*steps(torch.float64, adjust_lr), strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_it_equals_torch_in_float32_but_for_the_rounding_of_bfloat16():
    for ours, theirs in zip(*steps(torch.float32, "original"), strict=True):
        assert relative_error(ours, theirs) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [6, 640, 643])
def test_on_a_gpu_it_equals_torch_but_for_the_rounding_of_bfloat16(columns):
    """With products by our kernel where rows are of whole 16 bytes, and by torch."""
    sizes = {"stack": (3, 584, columns), "rows": (200, 384)}
    matrices = steps(torch.float32, "original", **sizes, device="cuda")
    for ours, theirs in zip(*matrices, strict=True):
        assert relative_error(ours, theirs) < 1e-2


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_changes_nothing(build, scale):
    run = build(optimizer=MUON)
    train_step(run, 0)
    before = {name: tensor.clone() for name, tensor in run_tensors(run).items()}
    for p in run.model.parameters():
        p.grad = torch.full_like(p, math.nan)
    run.optimizer.step(scale=torch.tensor(scale))
    for name, tensor in run_tensors(run).items():
        assert torch.equal(tensor, before[name]), name


def rule_of(run):
    names = {p: name for name, p in run.model.named_parameters()}
    muon, adamw = ([names[p] for p in group["params"]] for group in run.optimizer.param_groups)
    return set(muon), set(adamw)


def test_matrices_of_blocks_are_chosen_by_default(build):
    muon, adamw = rule_of(build(optimizer=MUON))
    kinds = ("attention.qkv.weight", "attention.out.weight", "ffn.experts.up", "ffn.experts.down")
    assert muon == {f"blocks.{i}.{kind}" for i in range(2) for kind in kinds}
    assert {"embed.weight", "head.weight", "norm.weight"} < adamw
    assert {f"blocks.0.{kind}" for kind in ("norm_1.weight", "ffn.router.weight")} < adamw


def test_patterns_choose(build):
    choice = {"include": ["*.experts.*", "head.*"], "exclude": ["*.down"]}
    muon, adamw = rule_of(build(optimizer=MUON | {"muon": choice}))
    assert muon == {"blocks.0.ffn.experts.up", "blocks.1.ffn.experts.up", "head.weight"}
    assert "blocks.0.ffn.experts.down" in adamw


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "muon", "muon": {"include": ["block.*"]}}, "muon.include: 'block.*' matches no"),
        ({"name": "muon", "muon": {"exclude": ["*"]}}, "leaves no matrix; give patterns such as"),
        ({"name": "adamw", "muon": {"ns_steps": 6}}, "section muon needs name muon, and name is"),
    ],
)
def test_errors(build, changes, match):
    with pytest.raises(ConfigError, match=match):
        build(optimizer=changes)


def test_a_model_without_names_of_blocks_is_refused():
    with pytest.raises(ConfigError, match="matches no parameter"):
        build_optimizer(OptimizerConfig(name="muon"), nn.Linear(3, 3))


def test_the_matrices_of_a_projection_are_told_apart(build):
    """Queries, keys and values of 4 heads and 2 of keys, and the gate of each expert."""
    run = build(optimizer=MUON)
    rule = run.optimizer.param_groups[0]["rule"]
    block = run.model.blocks[0]
    heads = [block.attention.heads, block.attention.kv_heads, block.attention.kv_heads]
    assert rule.fused_rows[block.attention.qkv.weight] == tuple(
        count * block.attention.head_dim for count in heads
    )
    assert rule.fused_rows[block.ffn.experts.up] == (16, 16)
    assert rule.fused_rows[block.ffn.experts.down] == (16,)


def test_the_schedule_scales_both_rates(build):
    schedule = {"name": "linear_decay_with_warmup", "t_warmup": "2ba"}
    run = build(optimizer=MUON | {"muon": {"adamw_lr": 0.003}}, scheduler=schedule)
    for batch in range(4):
        lr = train_step(run, batch).result.lr
        rates = [group["lr"] for group in run.optimizer.param_groups]
        assert rates == [
            learning_rate(run.config.scheduler, peak, batch, ScheduleSteps(2, 6))
            for peak in (0.01, 0.003)
        ]
        assert lr == rates[0]


def test_a_resumed_run_may_change_the_rate_but_not_the_choice_of_matrices(build):
    saved(build(optimizer=MUON))
    resumed(build(optimizer=MUON | {"lr": 0.02, "muon": {"momentum": 0.9}}, autoresume=True))
    other = MUON | {"muon": {"include": ["*.experts.*"]}}
    with pytest.raises(
        CheckpointError, match=r"optimizer.muon.include is \['\*.experts.\*'\], but"
    ):
        resumed(build(optimizer=other, autoresume=True))


def test_the_state_in_memory_is_exact(build):
    """One moment of matrices, two of the rest."""
    run = build(optimizer=MUON)
    muon, adamw = (sum(p.numel() for p in group["params"]) for group in run.optimizer.param_groups)
    assert estimate(run.config, run.model, ShardingReport({}, 0)).optimizer == 4 * muon + 8 * adamw


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16_master"])
def test_resuming_continues_bit_for_bit(build, precision):
    changes = {"optimizer": MUON, "precision": precision}
    changes |= {"algorithms": {"gradient_clipping": {"clipping_threshold": 0.5}}}
    run = build(**changes)
    run.convert_weights()
    first = train_step(run, 0).result.loss
    for batch in (1, 2):
        train_step(run, batch)
    saved(run, Position(batch=3))
    again = build(**changes, autoresume=True)
    resumed(again)
    again.convert_weights()
    assert train_step(again, 3).result == train_step(run, 3).result
    assert train_step(run, 4).result.loss < first
    train_step(again, 4)
    tensors = run_tensors(again)
    assert "optimizer.blocks.0.ffn.experts.up.momentum_buffer" in tensors
    for name, tensor in run_tensors(run).items():
        assert torch.equal(tensor, tensors[name]), name
