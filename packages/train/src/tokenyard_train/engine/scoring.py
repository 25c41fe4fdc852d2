"""Score given continuations: their log-likelihood, and whether greedy decoding gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenyard import PADDING, ConfigError, Model, pack_documents, why_no_documents

_LOGITS = 1 << 28  # of a batch: 1 GiB in float32


class Request(NamedTuple):
    """Ids that a model should continue with, and those before them."""

    context: Sequence[int]  # at least one
    continuation: Sequence[int]


class Score(NamedTuple):
    """How likely a continuation is."""

    nats: float  # log-likelihood
    greedy: bool  # whether each token is the likeliest


@torch.no_grad()
def score(model: Model, requests: Sequence[Request], batch_size: int) -> list[Score]:
    """Return the score of each request, in order. At most `batch_size` share a forward pass.

    Padding takes part in nothing. A context that is too long loses its start. Raises ConfigError
    for a continuation of more than max_seq_len tokens.
    """
    was_training = model.training
    model.eval()
    try:
        scores: list[Score | None] = [None] * len(requests)
        rows = [_row(model, request) for request in requests]
        for batch in _batches(model, rows, batch_size):
            logits = _logits(model, [rows[i][:-1] for i in batch])
            for i, row_logits in zip(batch, logits):
                scores[i] = _score(row_logits, requests[i].continuation, len(rows[i]) - 1)
        return [each for each in scores if each is not None]
    finally:
        model.train(was_training)


def _row(model: Model, request: Request) -> list[int]:
    """Return the last ids of a request that the model has room for. The last is only predicted."""
    if len(request.continuation) > model.max_seq_len:
        raise ConfigError(
            f"a continuation has {len(request.continuation)} tokens, and the model's max_seq_len "
            f"is {model.max_seq_len}; score a shorter one"
        )
    return [*request.context, *request.continuation][-model.max_seq_len - 1 :]


def _batches(model: Model, rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of rows that share a forward pass, longest first.

    A model that does not read packed documents gets rows of one length.
    """
    pads = why_no_documents(model) is None
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if batch:
            longest = len(rows[batch[0]])
            full = len(batch) == batch_size
            full |= (len(batch) + 1) * longest * model.vocab_size > _LOGITS
            if full or not (pads or len(rows[i]) == longest):
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _logits(model: Model, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [B, S, V] of rows of ids, whose padding is at the end."""
    device = next(model.parameters()).device
    shape = (len(rows), max(map(len, rows)))
    ids = torch.zeros(shape, dtype=torch.int64)
    numbers = torch.full(shape, PADDING)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        numbers[i, : len(row)] = 0
    packed = {}
    if (numbers == PADDING).any():
        packed["documents"] = pack_documents(numbers.to(device))
    logits: Tensor = model(ids.to(device), **packed).logits
    return logits


def _score(logits: Tensor, continuation: Sequence[int], end: int) -> Score:
    """Score the continuation that the logits [S, V] before `end` predict."""
    scores = logits[end - len(continuation) : end].float()
    ids = torch.tensor(continuation, device=scores.device)
    likely = scores.log_softmax(-1).gather(1, ids.unsqueeze(1))
    greedy = bool((scores.argmax(-1) == ids).all())
    return Score(float(likely.sum(dtype=torch.float64)), greedy)
