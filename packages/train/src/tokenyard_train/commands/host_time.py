"""Whether sharding a small model keeps the host longer than its matmuls keep the GPU."""

from __future__ import annotations

import math

from tokenyard import Model
from tokenyard.sharded import has_shards
from tokenyard_train.config.schema import TrainConfig

_FLOPS = 250e12  # a second, of 16-bit training on one H200
_SHARDING = 6.0  # milliseconds of the host for a block and microbatch: FSDP's hooks
_EXCHANGE = 8.0  # and for the exchange of its experts


def why_host_bound(config: TrainConfig, model: Model, ranks: int) -> str | None:
    """Return a sentence if a step of a sharded model waits for the host of a rank; else None.

    Both times are estimates, by figures of one H200. Eager blocks of a sharded model take the host
    the same time for any number of tokens.
    """
    if ranks == 1 or not config.device.startswith("cuda") or not has_shards(model):
        return None
    samples = config.global_train_batch_size / ranks
    microbatches = math.ceil(samples / int(config.device_train_microbatch_size))
    per_block = _SHARDING + (_EXCHANGE if config.parallel.expert_parallel > 1 else 0.0)
    host = microbatches * len(model.blocks) * per_block
    tokens = samples * config.max_seq_len
    gpu = 1e3 * 3 * model.flops_per_token(config.max_seq_len) * tokens / _FLOPS
    if host < gpu:
        return None
    return (
        f"a step of {round(tokens):,} tokens a process takes its GPU about {gpu:.0f} ms and its "
        f"host about {host:.0f} ms, because the model is sharded; if it fits on one GPU, give "
        "parallel.strategy ddp without expert_parallel, which can be compiled, or more tokens a "
        "step"
    )
