"""Continuing text with a model, one token at a time through its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenyard import ConfigError
from tokenyard_train.data import Tokenizer
from tokenyard_train.together import as_first


def continue_text(
    model: Any, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> str:
    """Return up to max_new_tokens tokens that follow the prompt, until the document ends or the model is full.

    Tokens are drawn from softmax(logits / temperature) by a generator of their own; at temperature 0 the likeliest is
    taken. An empty prompt starts a new document. Raises ConfigError for a prompt that leaves no room.
    """
    ids = [int(i) for i in tokenizer.encode(prompt.encode())] or [tokenizer.end]
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise ConfigError(f"the prompt has {len(ids)} tokens and the model's max_seq_len is {model.config.max_seq_len}")
    device = next(model.parameters()).device
    given = torch.tensor([ids], device=device)
    return tokenizer.decode(sample(model, given, min(room, max_new_tokens), temperature, seed, tokenizer.end)[0])


@torch.no_grad()
def sample(model: Any, ids: Tensor, tokens: int, temperature: float, seed: int, end: int) -> list[list[int]]:
    """Return for each row of ids [B, S] the tokens that follow, at most `tokens`, without the end that stops it."""
    was_training = model.training
    model.eval()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    cache = model.new_cache(ids.shape[0], ids.shape[1] + tokens)
    rows: list[list[int]] = [[] for _ in ids]
    running = [True] * len(rows)
    for _ in range(tokens):
        chosen = _next(model(ids, cache).logits[:, -1], temperature, generator)
        ids = as_first(chosen.to(ids.device))  # logits of ranks may differ in the last bit, and ids may not
        for i, token in enumerate(ids[:, 0].tolist()):
            running[i] = running[i] and token != end
            rows[i] += [token] if running[i] else []
        if not any(running):
            break
    model.train(was_training)
    return rows


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next ids [B, 1]; drawn on the CPU, so that a seed means the same on every device."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
