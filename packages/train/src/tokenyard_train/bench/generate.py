"""Measure how fast a config's model generates text, beside transformers' Mixtral of its size."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from tokenyard import ConfigError, Model, started_processes
from tokenyard.draw import draws_on_device
from tokenyard.errors import one_of
from tokenyard.sharded import allocate
from tokenyard_cli.console import print_line
from tokenyard_cli.results import Record
from tokenyard_models import Transformer, TransformerConfig
from tokenyard_train.bench.mixtral import IMPLEMENTATIONS, mixtral, mixtral_keys
from tokenyard_train.bench.time_limit import time_limit
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.build_model import build_model, meta_model
from tokenyard_train.engine.precision import (
    AMP_BF16,
    BF16_MASTER,
    COMPUTE_DTYPES,
    computing_in,
    narrow_experts,
    narrow_frozen,
)
from tokenyard_train.engine.sampling import Sampling, sample

Generate = Callable[[Tensor, int], object]
"""Continues prompts [B, P] by a number of tokens each."""

COMPILED = "-compiled"
"""End of the names of peers with a static cache, which transformers compiles and captures."""

GENERATORS = (*IMPLEMENTATIONS, *(name + COMPILED for name in IMPLEMENTATIONS))
"""Names of the peers."""

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
    _check_peers(config, meta, peers)
    _check_room(meta, requests)
    builds = [(OURS, partial(_ours, config))]
    builds += [(name, partial(_peer, config, meta, name)) for name in peers]
    for name, build in builds:
        generate = build() if name == OURS else _built(build)
        for request in requests:
            prompts = _prompts(meta.vocab_size, request, config.seed)
            measured = partial(
                _measure, generate, prompts, request.new_tokens, torch.device(config.device)
            )
            result = measured() if name == OURS else _of_peer(measured, peer_limit)
            text = result.get("error") or _rate(result)
            print_line(console, f"  {name}, prompts {request.batch}: {text}", "dim")
            yield {"contestant": name, **request._asdict(), **result}
        del generate, measured
        _free()


def _rate(times: Record) -> str:
    return f"{times['tokens_per_s']:,.0f} tokens/s, {times['token_ms']:.2f} ms a token"


def _built(build: Callable[[], Generate]) -> Generate:
    """Return a peer; one that raises the error if it cannot be built, such as for its memory."""
    try:
        return build()
    except ConfigError:
        raise
    except Exception as error:
        failure = error.with_traceback(None)  # its frames hold the unfinished model

    def fail(prompts: Tensor, new_tokens: int) -> object:
        raise failure

    return fail


def _of_peer(measured: Callable[[], Record], limit: float | None) -> Record:
    """Return a peer's times; the error instead if it fails or takes longer than the limit."""
    begin = time.perf_counter()
    try:
        with time_limit("--peer-limit", limit):
            return measured()
    except ConfigError:
        raise
    except Exception as error:  # a compiler may turn the limit's error into one of its own
        if limit is not None and time.perf_counter() - begin > limit:
            return {"error": f"took more than {limit:g} s"}
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}


def _check_peers(config: TrainConfig, meta: Model, peers: Sequence[str]) -> None:
    for name in peers:
        one_of("--peers", name, GENERATORS)
        if name.endswith(COMPILED) and not config.device.startswith("cuda"):
            raise ConfigError(
                f"--peers has {name!r}, and transformers compiles generation on a GPU only; on "
                f"{config.device} give {name.removesuffix(COMPILED)}"
            )
    if peers and config.lora is not None:
        raise ConfigError("--peers of bench generate have no adapters; give lora=null")
    if peers:
        mixtral_keys(_size(meta))


def _size(meta: Model) -> TransformerConfig:
    if not isinstance(meta, Transformer):
        raise ConfigError("--peers needs a model of tokenyard-models; give --peers none")
    return meta.config


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

    def generate(prompts: Tensor, new_tokens: int) -> object:
        with computing_in(config.precision, torch.device(config.device)):
            return sample(model, prompts.tolist(), Sampling(new_tokens, 0.0, seed=0))

    return generate


def _peer(config: TrainConfig, meta: Model, name: str) -> Generate:
    """Return transformers' generation, with weights in the dtype that ours computes in."""
    dtype = COMPUTE_DTYPES[config.precision]
    implementation = IMPLEMENTATIONS[name.removesuffix(COMPILED)]
    model = mixtral(_size(meta), implementation, dtype, config.device).eval()
    model.config.output_router_logits = False  # they are for the training loss
    keys = _compiled() if name.endswith(COMPILED) else {}

    def generate(prompts: Tensor, new_tokens: int) -> object:
        return model.generate(
            prompts.to(config.device),
            attention_mask=torch.ones_like(prompts).to(config.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            **keys,
        )

    return generate


def _compiled() -> dict[str, Any]:
    """Return the arguments with which transformers compiles the step of one token."""
    from transformers import CompileConfig

    # Sizes are fixed: a graph for any number of prompts is slower, and the second one's.
    return {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}


def _measure(generate: Generate, prompts: Tensor, new_tokens: int, device: torch.device) -> Record:
    """Return the tokens/s of whole continuations, and the milliseconds of one more token."""
    half = new_tokens // 2
    # Compile and capture. The longer one is first, because transformers keeps the size of a static
    # cache until a request needs a larger one, for which it compiles again.
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
