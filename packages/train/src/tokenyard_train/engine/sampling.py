"""Generate text with a model, one token at a time through its cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from tokenyard import ConfigError, Model, TokenyardError
from tokenyard_train.data import Tokenizer
from tokenyard_train.data.text_loss import LossCounter
from tokenyard_train.distributed import broadcast_from_rank0
from tokenyard_train.engine.decoder import Decoder

log = logging.getLogger("tokenyard")

_GREEDY = 1e-6
"""Below this temperature the likeliest token is taken: float32 has no room for logits / it."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int  # of each continuation
    temperature: float  # of the softmax; 0 takes the likeliest token
    seed: int
    stops: Collection[int] = ()  # ids that end a continuation
    warn_when_full: bool = False  # warn if max_seq_len ends a continuation
    complete: Callable[[Sequence[int], Sequence[int]], bool] | None = (
        None  # of a prompt and its continuation: whether it ends here
    )


def continue_texts(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling
) -> list[str]:
    """Return the text that follows each prompt, until the document ends or the model is full.

    The tokenizer's end of a document is a stop. An empty prompt starts a new document. Raises
    ConfigError for a prompt that leaves no room.
    """
    return continue_ids(model, tokenizer, encode_prompts(model, tokenizer, prompts), sampling)


def continue_ids(
    model: Model,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    decoder: Decoder | None = None,
) -> list[str]:
    """Return the text that follows each prompt of ids, as `continue_texts`.

    Prompts must leave room in the model. `decoder` is that of `sample`.
    """
    room = model.max_seq_len - max(len(ids) for ids in prompt_ids)
    limited = replace(
        sampling,
        max_new_tokens=min(room, sampling.max_new_tokens),
        stops={tokenizer.end, *sampling.stops},
    )
    rows = sample(model, prompt_ids, limited, decoder)
    longest = max(len(row) for row in rows)
    if sampling.warn_when_full and longest == room < sampling.max_new_tokens:
        log.warning(
            "the text ends after %d new tokens instead of %d: the model's max_seq_len is %d",
            room,
            sampling.max_new_tokens,
            model.max_seq_len,
        )
    return [text_after(tokenizer, ids, row) for ids, row in zip(prompt_ids, rows)]


def encode_prompts(model: Model, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each prompt, and of an empty one the id that ends a document.

    Raises ConfigError for a prompt that leaves the model no room, or whose ids it does not have.
    """
    prompt_ids = [
        [int(i) for i in tokenizer.encode(utf8(prompt))] or [tokenizer.end] for prompt in prompts
    ]
    longest = max(len(ids) for ids in prompt_ids)
    if longest >= model.max_seq_len:
        raise ConfigError(
            f"the prompt has {longest} tokens and the model's max_seq_len is {model.max_seq_len}; "
            "shorten the prompt"
        )
    for prompt, ids in zip(prompts, prompt_ids):
        check_vocabulary(model, ids, f"the prompt {prompt[:40]!r}")
    return prompt_ids


def warn_of_loss(tokenizer: Tokenizer, prompts: Sequence[str], location: str) -> None:
    """Log a warning for prompts with text that the tokenizer drops or changes."""
    counter = LossCounter(tokenizer)
    for prompt in prompts:
        counter.encode(utf8(prompt))
    counter.loss.ended = 0  # a prompt may end a turn or a document on purpose
    counter.loss.warn(location, "prompts")


def check_vocabulary(model: Model, ids: Collection[int], text: str) -> None:
    """Raise ConfigError if a text has an id that the model has no embedding for."""
    if max(ids) >= model.vocab_size:
        raise ConfigError(
            f"{text} has the id {max(ids)}, and the model has {model.vocab_size} ids; give the "
            "tokenizer that the model was trained with"
        )


def utf8(prompt: str) -> bytes:
    """Return a prompt as UTF-8. Raises ConfigError if it is no text."""
    try:
        return prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {prompt[:40]!r} is not UTF-8 text") from None


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """Return the text that a continuation adds to its prompt, both given as ids.

    Both are decoded together: many tokenizers drop the space of a text's first token, and the bytes
    of one character may lie on both sides.
    """
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode([*prompt, *continuation])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole)))
    return whole[shared:]


def sample(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """Return the ids that follow each prompt, without the stop that ends them.

    Prompts may differ in length. All advance together from the end of the shortest: a longer one
    takes its own next id until it is used up, so nothing is padded. A `decoder` keeps the cache and
    the CUDA graph for the next call with as many prompts. Raises ConfigError for a text that is
    longer than the model's max_seq_len before it stops.
    """
    was_training = model.training
    model.eval()
    try:
        return _sample(model, prompts, sampling, decoder or Decoder())
    finally:
        model.train(was_training)


@torch.no_grad()
def _sample(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    decoder: Decoder,
) -> list[list[int]]:
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu").manual_seed(sampling.seed)
    shortest = min(len(prompt) for prompt in prompts)
    length = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    step, first = decoder.start(model, prompts, length)
    ids = torch.tensor([list(prompt[first:shortest]) for prompt in prompts], device=device)
    rows: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(rows)
    step.begin(length - shortest)
    held = first
    for position in range(shortest, length):
        _check_length(model, position)
        drawn = _draw(step(ids), sampling.temperature, generator)
        held = position
        # The last bit of the logits may differ between ranks, and ids must not.
        next_ids = _checked(broadcast_from_rank0(drawn).tolist())
        for i, prompt in enumerate(prompts):
            if position < len(prompt):
                next_ids[i] = prompt[position]
                continue
            running[i] = running[i] and next_ids[i] not in sampling.stops
            if running[i]:
                rows[i].append(next_ids[i])
            running[i] = running[i] and not _is_complete(prompt, rows[i], sampling)
        if not any(running):
            break
        ids = torch.tensor(next_ids, device=device).unsqueeze(1)
    decoder.keep(step, model, len(prompts), [*prompts[0], *rows[0]][:held])
    return rows


def _check_length(model: Model, tokens: int) -> None:
    """Raise ConfigError for more tokens than a model has positions. A CUDA graph does not count."""
    if tokens > model.max_seq_len:
        raise ConfigError(
            f"the text has {tokens} tokens and the model's max_seq_len is {model.max_seq_len}; "
            "lower max_new_tokens, or shorten the prompt"
        )


def _is_complete(prompt: Sequence[int], row: Sequence[int], sampling: Sampling) -> bool:
    if len(row) >= sampling.max_new_tokens:
        return True
    return sampling.complete is not None and sampling.complete(prompt, row)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw the next ids [B] from logits [B, V]; -1 for logits that hold nan or inf.

    The random numbers are those of a CPU, so that a seed gives the same ones on every device.
    """
    if temperature < _GREEDY:
        highest, ids = logits.float().max(-1)
        return ids.where(highest.isfinite(), -1)
    shares = (logits.double() / temperature).softmax(-1).cumsum(-1)
    total = shares[:, -1:]
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    ids = torch.searchsorted(shares, drawn.to(total.device) * total, right=True)[:, 0]
    return ids.clamp(max=logits.shape[1] - 1).where(total[:, 0].isfinite(), -1)


def _checked(ids: list[int]) -> list[int]:
    """Return drawn ids. Raises TokenyardError for one of logits that hold nan or inf."""
    if min(ids) < 0:
        raise TokenyardError(
            "the model's logits hold nan or inf, so no text can be drawn from them; look for nan "
            "in its weights, or give another precision"
        )
    return ids
