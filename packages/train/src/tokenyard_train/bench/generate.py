"""Measure how fast a config's model generates text, beside transformers' Mixtral of its size."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from tokenyard import ConfigError, Model, started_processes
from tokenyard.draw import draws_on_device
from tokenyard.sharded import allocate
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record
from tokenyard_train.bench.generate_peer import Generate, build_peer, check_peers, times_or_error
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.build_model import build_model, meta_model
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.precision import (
    AMP_BF16,
    BF16_MASTER,
    computing_in,
    narrow_experts,
    narrow_frozen,
)
from tokenyard_train.engine.sampling import Sampling, sample

OURS = "tokenyard"
_REPEATED = 3


class Request(NamedTuple):
    """What every entrant generates."""

    batch: int  # prompts
    prompt_tokens: int  # of each prompt
    new_tokens: int  # of each continuation


def bench_generate(
    config: TrainConfig,
    peers: Sequence[str],
    requests: Sequence[Request],
    peer_limit: float | None,
    console: Console,
) -> Iterator[Record]:
    """Generate from random prompts with random weights, each entrant alone on the device.

    Takes the likeliest token. Yields each record when it is measured. A peer that cannot be built,
    that fails, or that takes more than `peer_limit` seconds for a request, has a record with an
    `error` and no times. Raises ConfigError for an unknown peer, for one without a model of this
    size or beside adapters, for prompts that do not fit in the model, and for several ranks.
    """
    if started_processes() > 1:
        raise ConfigError("bench generate runs with one rank; start it without torchrun")
    meta = meta_model(config)
    check_peers(config, meta, peers)
    _check_room(meta, requests)
    builds = [(OURS, partial(_ours, config))]
    builds += [(name, partial(build_peer, config, meta, name)) for name in peers]
    for name, build in builds:
        generate = build()
        for request in requests:
            prompts = _prompts(meta.vocab_size, request, config.seed)
            measured = partial(
                _measure, generate, prompts, request.new_tokens, torch.device(config.device)
            )
            result = measured() if name == OURS else times_or_error(measured, peer_limit)
            text = result.get("error") or _rate(result)
            print_line(console, f"  {name}, prompts {request.batch}: {text}", "dim")
            yield {"contestant": name, **request._asdict(), **result}
        del generate, measured
        _free()


def _rate(times: Record) -> str:
    return f"{times['tokens_per_s']:,.0f} tokens/s, {times['token_ms']:.2f} ms a token"


def _check_room(model: Model, requests: Sequence[Request]) -> None:
    for request in requests:
        tokens = request.prompt_tokens + request.new_tokens
        if tokens > model.max_seq_len:
            raise ConfigError(
                f"--prompt-tokens {request.prompt_tokens} and --new-tokens {request.new_tokens} "
                f"are {tokens} tokens, and max_seq_len is {model.max_seq_len}; give fewer"
            )


def _prompts(vocabulary: int, request: Request, seed: int) -> Tensor:
    """Return random ids [B, P]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (request.batch, request.prompt_tokens), generator=random)


def _model(config: TrainConfig) -> Model:
    """Return the config's model with random weights, as it is loaded to generate."""
    _, model = build_model(config)
    model.requires_grad_(False)
    if config.precision == BF16_MASTER:
        narrow_frozen(model)
    if config.precision == AMP_BF16:
        narrow_experts(model)
    allocate(model, config.device)
    with draws_on_device():
        model.init_weights(config.seed)
    return model


def _ours(config: TrainConfig) -> Generate:
    model = _model(config)
    decoder = Decoder()

    def generate(prompts: Tensor, new_tokens: int) -> object:
        with computing_in(config.precision, torch.device(config.device)):
            return sample(model, prompts.tolist(), Sampling(new_tokens, 0.0, seed=0), decoder)

    return generate


def _measure(generate: Generate, prompts: Tensor, new_tokens: int, device: torch.device) -> Record:
    """Return the tokens/s of whole continuations, and the milliseconds of one more token."""
    half = new_tokens // 2
    # Compile and capture. The longer one is first: a request that needs a larger cache than those
    # before captures again, and transformers compiles again, too.
    for tokens in (new_tokens, half):
        _seconds(generate, prompts, tokens, device)
    whole, short = (
        median(_seconds(generate, prompts, tokens, device) for _ in range(_REPEATED))
        for tokens in (new_tokens, half)
    )
    return {
        "tokens_per_s": round(len(prompts) * new_tokens / whole, 1),
        "request_ms": round(1e3 * whole, 1),
        "token_ms": round(1e3 * (whole - short) / (new_tokens - half), 3),
    }


def _seconds(generate: Generate, prompts: Tensor, new_tokens: int, device: torch.device) -> float:
    """Return the seconds of a call, with the host's work."""
    _wait(device)
    begin = time.perf_counter()
    generate(prompts, new_tokens)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
