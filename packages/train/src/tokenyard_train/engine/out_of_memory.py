"""Turn a failed allocation into one sentence. Another attempt would fail again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tokenyard import ConfigError
from tokenyard.devices import device_memory
from tokenyard.sharded import is_out_of_memory
from tokenyard.units import describe_bytes
from tokenyard_train.config.schema import TrainConfig


@contextmanager
def out_of_memory_is_a_mistake(config: TrainConfig) -> Iterator[None]:
    """Context: raise ConfigError, with what to change, in place of an allocation's error."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or "no memory is left"
        raise ConfigError(
            f"{config.device} is out of memory with device_train_microbatch_size "
            f"{config.device_train_microbatch_size} and max_seq_len {config.max_seq_len} "
            f"({reason}); make these or the model smaller, set activation_checkpointing: true, or "
            "shard it over more devices; `tokenyard check` estimates the memory"
        ) from None


def check_batch_fits(config: TrainConfig, ranks: int) -> None:
    """Raise ConfigError for a batch whose token ids alone do not fit in host memory."""
    samples = {"global_train_batch_size": config.global_train_batch_size // ranks}
    if config.eval_loader is not None or config.eval_loaders:
        samples["device_eval_batch_size"] = config.device_eval_batch_size or 1
    memory = device_memory("cpu")
    for name, batch in samples.items():
        size = batch_bytes(batch, config.max_seq_len)
        if memory is not None and size > memory:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, whose token ids take "
                f"{describe_bytes(size)} of a rank, and this machine has "
                f"{describe_bytes(memory)}; lower it"
            )


def batch_bytes(samples: int, max_seq_len: int) -> int:
    """Return the bytes of the token ids of some samples."""
    return 8 * samples * (max_seq_len + 1)
