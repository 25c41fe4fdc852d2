"""How many optimizer steps a run and its intervals have, and warnings of those without effect."""

from __future__ import annotations

from tokenyard import ConfigError
from tokenyard_train.config.duration import Span
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.engine.schedule import check_schedule


def run_batches(config: TrainConfig, data: Data) -> int:
    """Return the optimizer steps of the whole run. Raises ConfigError if there are none."""
    tokens = config.global_train_batch_size * config.max_seq_len
    batches = config.max_duration.batches(tokens, epoch_batches(config, data))
    if batches < 1:
        raise ConfigError(
            f"max_duration is {config.max_duration}, which is less than one batch of {tokens} "
            "tokens"
        )
    return batches


def epoch_batches(config: TrainConfig, data: Data) -> int:
    """Return the optimizer steps of one epoch.

    Samples that do not fill a last batch come first in the next epoch.
    """
    return max(1, len(data.train) // config.global_train_batch_size)


def span_batches(span: Span, config: TrainConfig, data: Data, batches: int) -> int:
    """Return a span of training in optimizer steps of a run that has `batches` of them."""
    tokens = config.global_train_batch_size * config.max_seq_len
    return span.batches(tokens, epoch_batches(config, data), batches)


def schedule_warnings(config: TrainConfig, data: Data) -> list[str]:
    """Return sentences on a long warm-up, a rate of 0, and intervals without an effect."""
    batches = run_batches(config, data)

    def steps(span: Span) -> int:
        return span_batches(span, config, data, batches)

    warmup = steps(config.scheduler.t_warmup)
    warnings = check_schedule(config.scheduler, warmup, steps(config.scheduler.t_max), batches)
    for name in ("eval_interval", "save_interval"):
        span = getattr(config, name)
        if span is not None and steps(span) < 1:
            warnings.append(f"{name} is {span}, less than a step, which means after every step")
    given = [key for key in ("eval_interval", "eval_first") if getattr(config, key)]
    if given and not data.held_out_sets():
        warnings.append(
            f"{' and '.join(given)}: no effect, because there is no held-out text; give eval_loader"
        )
    return warnings
