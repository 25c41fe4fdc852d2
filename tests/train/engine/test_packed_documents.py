"""Packed documents in a step: the loss of supervised tokens, and padding that counts nowhere."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tokenyard import IGNORED, PADDING, moe_layers, pack_documents
from tokenyard.tolerance import relative_error
from tokenyard_train.data.batch import Batch
from tokenyard_train.engine.microbatch import accumulate
from tokenyard_train.engine.step import train_step

from ..conftest import MODEL

LENGTHS = [[9, 11], [24], [3, 4, 5, 6], [20]]  # of the documents of each row of 24 tokens
NO_AUXILIARY = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_loss_weight": 0.0}}
Z_LOSS = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_zloss_weight": 0.01}}


def documents() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ids and targets of each document of LENGTHS; half of the targets are supervised."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for length in (length for row in LENGTHS for length in row):
        ids = torch.randint(0, 257, (length,), generator=generator)
        targets = torch.randint(0, 257, (length,), generator=generator)
        targets[: length // 2] = IGNORED
        result.append((ids, targets))
    return result


class Packed:
    """Training data of one batch: the rows of LENGTHS."""

    length = 24

    def __len__(self) -> int:
        return 4

    def microbatches(self, step, size, rank, world, rows) -> list[Batch]:
        ids = torch.zeros(4, 24, dtype=torch.int64)
        targets = torch.full((4, 24), IGNORED)
        numbers = torch.full((4, 24), PADDING)
        each = iter(documents())
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for number, length in enumerate(lengths):
                here = slice(start, start + length)
                ids[row, here], targets[row, here] = next(each)
                numbers[row, here] = number
                start += length
        parts = zip(ids.split(rows), targets.split(rows), numbers.split(rows))
        return [Batch(i, t, pack_documents(n, count=5 * rows, longest=24)) for i, t, n in parts]


def packed(build, **changes):
    """Return a run in float64 on packed documents."""
    setup = build(**changes)
    setup.model.double().train()
    for moe in moe_layers(setup.model):
        moe.workload = moe.experts.workload = replace(moe.workload, dtype=torch.float64)
    return replace(setup, data=SimpleNamespace(train=Packed()))


def gradients(setup) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in setup.model.named_parameters()}


def test_the_loss_is_the_mean_over_supervised_tokens_of_documents_alone(build):
    setup = packed(build, model=Z_LOSS)
    result = accumulate(setup, 0)
    got = gradients(setup)
    setup.model.zero_grad()
    tokens = sum(sum(row) for row in LENGTHS)
    nats = 0.0
    supervised = 0
    balances = []
    for ids, targets in documents():
        output = setup.model(ids[None])
        nats += F.cross_entropy(output.logits[0], targets, reduction="sum")
        supervised += int((targets != IGNORED).sum())
        balances.append(output.balances)
    layers = [[torch.stack(parts).sum(0) for parts in zip(*layer)] for layer in zip(*balances)]
    share = [counts.double() / tokens * probs / tokens for counts, _, probs, _ in layers]
    auxiliary = 0.05 * 4 / 2 * sum(s.sum() for s in share) / 2
    auxiliary += 0.01 * sum(z / tokens for *_, z in layers) / 2
    (nats / supervised + auxiliary).backward()
    assert (result.tokens, result.supervised) == (tokens, supervised)
    assert relative_error(result.loss, nats / supervised) < 1e-12
    for name, parameter in setup.model.named_parameters():
        assert relative_error(got[name], parameter.grad) < 1e-12, name


@pytest.mark.parametrize("microbatch", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_microbatches_change_nothing_but_rounding(build, microbatch, recompute):
    whole = packed(build, model=NO_AUXILIARY)
    parts = packed(
        build,
        model=NO_AUXILIARY,
        device_train_microbatch_size=microbatch,
        activation_checkpointing=recompute,
    )
    losses = [accumulate(setup, 0).loss for setup in (whole, parts)]
    assert relative_error(losses[1], losses[0]) < 1e-12
    got = gradients(parts)
    for name, gradient in gradients(whole).items():
        assert relative_error(got[name], gradient) < 1e-12, name


def test_the_numbers_of_a_step_leave_padding_out(build):
    setup = packed(build)
    result = train_step(setup, 0).result
    assert result.supervised == sum(-(-length // 2) for row in LENGTHS for length in row)
    assert [sum(layer) for layer in result.load] == pytest.approx([1, 1], abs=1e-5)
    assert result.dropped == 0
    plain = train_step(build(), 0).result
    assert plain.supervised == 96


def test_a_batch_without_supervised_tokens_has_no_loss_and_no_nan(build, monkeypatch):
    setup = packed(build, model=NO_AUXILIARY)
    rows = Packed().microbatches(0, 4, 0, 1, 4)
    rows = [each._replace(targets=torch.full_like(each.targets, IGNORED)) for each in rows]
    monkeypatch.setattr(setup.data.train, "microbatches", lambda *args: rows)
    assert accumulate(setup, 0).loss == 0
    assert not any(gradient.any() for gradient in gradients(setup).values())
