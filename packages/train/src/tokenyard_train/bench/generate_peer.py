"""Peers of `bench generate`: transformers' Mixtral of our model's size, eager or compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenyard import ConfigError, Model
from tokenyard.errors import one_of
from tokenyard_cli.results import Record
from tokenyard_models import Transformer, TransformerConfig
from tokenyard_train.bench.mixtral import IMPLEMENTATIONS, mixtral, mixtral_keys
from tokenyard_train.bench.time_limit import time_limit
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.engine.precision import COMPUTE_DTYPES

Generate = Callable[[Tensor, int], object]
"""Continues prompts [B, P] by a number of tokens each."""

COMPILED = "-compiled"
"""End of the names of peers with a static cache, which transformers compiles and captures."""

GENERATORS = (*IMPLEMENTATIONS, *(name + COMPILED for name in IMPLEMENTATIONS))
"""Names of the peers."""


def check_peers(config: TrainConfig, meta: Model, peers: Sequence[str]) -> None:
    """Raise ConfigError for peers that are unknown or cannot generate beside this config."""
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


def build_peer(config: TrainConfig, meta: Model, name: str) -> Generate:
    """Return a peer's generation; one that raises the error if it cannot be built.

    It may not fit in memory, for example. `meta` is our model without data. Weights have the dtype
    in which ours computes. Raises ConfigError.
    """
    try:
        return _peer(config, meta, name)
    except ConfigError:
        raise
    except Exception as error:
        failure = error.with_traceback(None)  # its frames hold the unfinished model

    def fail(prompts: Tensor, new_tokens: int) -> object:
        raise failure

    return fail


def times_or_error(measured: Callable[[], Record], limit: float | None) -> Record:
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


def _peer(config: TrainConfig, meta: Model, name: str) -> Generate:
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


def _size(meta: Model) -> TransformerConfig:
    if not isinstance(meta, Transformer):
        raise ConfigError("--peers needs a model of tokenyard-models; give --peers none")
    return meta.config
