"""Continuing text with a model, one token at a time through its cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tokenyard import ConfigError, Model
from tokenyard_train.data import Tokenizer
from tokenyard_train.distributed import broadcast_from_rank0


def continue_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stops: Collection[int] = (),
) -> list[str]:
    """Return up to max_new_tokens tokens that follow each prompt, until the document ends or the model is full.

    Tokens are drawn from softmax(logits / temperature) by a generator of their own; at temperature 0 the likeliest is
    taken. `stops` are ids that end a document besides the tokenizer's. An empty prompt starts a new document. Raises
    ConfigError for a prompt that leaves no room.
    """
    given = [
        [int(i) for i in tokenizer.encode(prompt.encode())] or [tokenizer.end] for prompt in prompts
    ]
    longest = max(len(ids) for ids in given)
    room = model.max_seq_len - longest
    if room < 1:
        raise ConfigError(
            f"the prompt has {longest} tokens and the model's max_seq_len is {model.max_seq_len}"
        )
    rows = sample(
        model, given, min(room, max_new_tokens), temperature, seed, {tokenizer.end, *stops}
    )
    return [tokenizer.decode(row) for row in rows]


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    seed: int,
    stops: Collection[int],
) -> list[list[int]]:
    """Return for each prompt the ids that follow, at most `tokens`, without the one of `stops` that ends them.

    Prompts may differ in length: all advance together from the end of the shortest, and the longer ones are given their
    own next id until they have had all, so that nothing is padded.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    cache = model.new_cache(len(prompts), longest + tokens)
    ids = torch.tensor([list(prompt[:shortest]) for prompt in prompts], device=device)
    rows: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(rows)
    for place in range(shortest, longest + tokens):
        chosen = broadcast_from_rank0(
            _next(model(ids, cache).logits[:, -1], temperature, generator).to(device)
        )
        # logits of ranks may differ in the last bit, and ids may not
        following = chosen[:, 0].tolist()
        for i, prompt in enumerate(prompts):
            if place < len(prompt):
                following[i] = prompt[place]
                continue
            running[i] = running[i] and following[i] not in stops
            rows[i] += [following[i]] if running[i] else []
            running[i] = running[i] and len(rows[i]) < tokens
        if not any(running):
            break
        ids = torch.tensor(following, device=device).unsqueeze(1)
    model.train(was_training)
    return rows


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next ids [B, 1]; drawn on the CPU, so that a seed means the same on every device."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
