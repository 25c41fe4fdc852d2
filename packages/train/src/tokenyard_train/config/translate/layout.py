"""Translate `fsdp_config`: how LLM Foundry shards a model over its ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from tokenyard import ConfigError
from tokenyard_models.strict_config import Strict, only, parse, without_ignored
from tokenyard_train.config.translate.change import Change


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


AnyCase = BeforeValidator(_upper)
"""Accepts names in small letters, too, as Composer and LLM Foundry do."""


class FsdpConfig(Strict):
    """Composer's options of FSDP."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        (
            "activation_checkpointing_reentrant",
            "auto_wrap",
            "backward_prefetch",
            "backward_prefetch_limit",
            "flatten_parameters",
            "forward_prefetch",
            "forward_prefetch_limit",
            "keep_low_precision_grads",
            "limit_all_gathers",
            "load_fsdp_monolith_rank0_only",
            "load_monolith_rank0_only",
            "load_planner",
            "min_params",
            "save_planner",
            "sharded_ckpt_prefix_dir",
            "state_dict_type",
            "sync_module_states",
            "te_checkpoint_wrapper",
            "te_shard_fp8_weight",
            "use_orig_params",
            "verbose",
        )
    )

    sharding_strategy: Annotated[
        Literal["FULL_SHARD", "HYBRID_SHARD", "SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2", "NO_SHARD"],
        AnyCase,
    ] = "FULL_SHARD"
    mixed_precision: Annotated[Literal["PURE", "DEFAULT", "FULL"] | dict[str, str], AnyCase] = (
        "DEFAULT"
    )
    activation_checkpointing: bool = False
    activation_cpu_offload: bool = False
    cpu_offload: Annotated[bool, only(False, "keeping parameters in host memory")] = False
    data_parallel_shard_degree: int = Field(-1, ge=-1)
    data_parallel_replicate_degree: int | None = Field(None, ge=1)


def translate_layout(
    config: Mapping[str, Any], changes: list[Change], ignored: list[str], processes: int
) -> dict[str, Any]:
    """Return a config with `parallel` and activation checkpointing in place of `fsdp_config`.

    `parallel.strategy` that the config has is kept. One process is not sharded, as in LLM Foundry.
    Raises ConfigError for options that are not here.
    """
    read = dict(config)
    section = read.pop("fsdp_config", None)
    if section is None:
        return read
    if not isinstance(section, Mapping):
        raise ConfigError(f"fsdp_config is {section!r}; give a mapping of keys to values")
    kept = without_ignored(FsdpConfig, section, "fsdp_config", ignored)
    given = parse(FsdpConfig, {k: v for k, v in kept.items() if v is not None}, "fsdp_config")
    for key in ("activation_checkpointing", "activation_cpu_offload"):
        if getattr(given, key):
            _move(read, key, changes)
        elif key in kept:
            changes.append(Change(f"fsdp_config.{key}", "left out; it is the default", told=False))
    if "mixed_precision" in kept:
        note = "left out; weights and sums of gradients are float32; bf16_master has 16-bit weights"
        sharded = processes > 1
        changes.append(Change("fsdp_config.mixed_precision", note, told=sharded))
    return _with_strategy(read, given, changes, processes)


def _move(read: dict[str, Any], key: str, changes: list[Change]) -> None:
    """Set a top-level key that is true in fsdp_config."""
    if read.get(key) not in (None, True):
        raise ConfigError(
            f"fsdp_config.{key} is True and {key} is {read[key]!r}; they mean the same, set one"
        )
    read[key] = True
    changes.append(Change(f"fsdp_config.{key}", f"{key}: true", told=False))


def _with_strategy(
    read: dict[str, Any], given: FsdpConfig, changes: list[Change], processes: int
) -> dict[str, Any]:
    key = "fsdp_config.sharding_strategy"
    parallel = read.get("parallel") or {}
    if not isinstance(parallel, Mapping):  # the schema reports it
        return read
    if "strategy" in parallel:
        changes.append(Change(key, "left out; parallel.strategy says it"))
        return read
    if processes == 1:
        note = "parallel.strategy: single, because there is one process"
        changes.append(Change(key, note, told=False))
        return read
    strategy = _strategy(given, processes)
    changes.append(Change(key, f"parallel.strategy: {strategy}", told=False))
    return read | {"parallel": {**parallel, "strategy": strategy}}


def _strategy(given: FsdpConfig, processes: int) -> str | dict[str, Any]:
    if given.sharding_strategy == "NO_SHARD":
        return "ddp"
    options: dict[str, Any] = {}
    replicas = _replicas(given, processes)
    if replicas > 1:
        options["replicate"] = replicas
    if given.sharding_strategy in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2"):
        options["reshard_after_forward"] = False
    return {"name": "fsdp", **options} if options else "fsdp"


def _replicas(given: FsdpConfig, processes: int) -> int:
    """Return the number of replicas: as the degrees say, or one for each machine (HYBRID_SHARD)."""
    if given.data_parallel_replicate_degree is not None:
        return given.data_parallel_replicate_degree
    shards = given.data_parallel_shard_degree
    if shards > 0 and processes % shards == 0:
        return processes // shards
    if shards > 0:
        raise ConfigError(
            f"fsdp_config.data_parallel_shard_degree is {shards}, which does not divide the "
            f"{processes} ranks"
        )
    if "HYBRID_SHARD" not in given.sharding_strategy:
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(local) if local.isdecimal() and int(local) else processes
    return max(1, processes // ranks)
