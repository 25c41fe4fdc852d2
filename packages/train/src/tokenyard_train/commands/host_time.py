"""Whether ranks that share a small model are slower than one GPU, because of their hosts."""

from __future__ import annotations

import math

from tokenyard import Model
from tokenyard.count import training_flops_per_token
from tokenyard.sharded import has_shards
from tokenyard_train.config.schema import TrainConfig

_FLOPS_PER_S = 250e12  # of 16-bit training on one H200
_HOST_MS = 11.0  # for a block of a microbatch, beside an H200: operators, and FSDP's hooks
_EXCHANGE_MS = 3.0  # beside that, for the exchange of a block


def why_ranks_lose(config: TrainConfig, model: Model, ranks: int) -> str | None:
    """Return a sentence if the hosts of a sharded model take longer than one GPU alone; else None.

    Both times are estimates from measurements beside H200s. Launching the blocks of a sharded model
    takes a host the same time for any number of tokens.
    """
    if ranks == 1 or not config.device.startswith("cuda") or not has_shards(model):
        return None
    samples = config.global_train_batch_size
    microbatches = math.ceil(samples / ranks / int(config.device_train_microbatch_size))
    exchange = _EXCHANGE_MS if (config.parallel.expert_parallel or 1) > 1 else 0.0
    host = microbatches * len(model.blocks) * (_HOST_MS + exchange)
    tokens = samples * config.max_seq_len
    gpu = 1e3 * training_flops_per_token(model, config.max_seq_len) * tokens / _FLOPS_PER_S
    if host < gpu:
        return None
    return (
        f"a step takes the host of each of the {ranks} ranks about {host:.0f} ms, because the "
        f"model is sharded, and one GPU would compute all {tokens:,} tokens in about {gpu:.0f} ms; "
        "if the model fits on one GPU, give parallel.strategy ddp without expert_parallel, else "
        "more tokens a step"
    )
