"""Keys of LLM Foundry that are ignored, renamed, or refused with the key to use instead."""

from __future__ import annotations

TOP = frozenset(
    (
        "accumulate_train_batch_on_tokens",
        "activation_checkpointing_reentrant",
        "code_paths",
        "compile_config",
        "deepspeed_config",
        "device_eval_microbatch_size",
        "device_train_batch_size",
        "device_train_grad_accum",
        "dist_timeout",
        "eval_first",
        "eval_gauntlet",
        "eval_gauntlet_str",
        "expandable_segments",
        "flatten_imports",
        "fsdp_config",
        "icl_seq_len",
        "icl_subset_num_batches",
        "icl_tasks",
        "icl_tasks_str",
        "load_exclude_algorithms",
        "load_ignore_keys",
        "load_strict_model_weights",
        "load_weights_only",
        "log_config",
        "log_to_console",
        "max_split_size_mb",
        "metadata",
        "n_gpus",
        "only_composer_checkpoint",
        "only_hf_checkpoint",
        "profiler",
        "progress_bar",
        "python_log_level",
        "save_filename",
        "save_ignore_keys",
        "save_latest_filename",
        "save_weights_only",
        "spin_dataloaders",
        "tp_config",
    )
)
"""Ignored top-level keys: sharding, logging, profiling, file names, in-context evaluation."""

ALGORITHMS = frozenset(("low_precision_layernorm",))
"""Ignored in algorithms: it selects kernels and does not change the result."""

CALLBACKS = frozenset(
    (
        "activation_monitor",
        "activation_monitor_full_model",
        "async_eval",
        "env_logger",
        "eval_output_logging",
        "export_for_inference",
        "fdiff",
        "hf_checkpointer",
        "loss_perp_v_len",
        "lr_monitor",
        "mbmoe_tok_per_expert",
        "memory_monitor",
        "memory_snapshot",
        "mono_checkpoint_saver",
        "monolithic_ckpt_callback",
        "nan_monitor",
        "oom_observer",
        "optimizer_monitor",
        "run_timeout",
        "runtime_estimator",
        "scheduled_gc",
        "speed_monitor",
        "system_metrics_monitor",
    )
)
"""Ignored in callbacks: those that only observe. metrics.jsonl has what several of them report.

A callback that changes the training, such as layer_freezing, is refused like any unknown key.
"""

LOGGERS = frozenset(
    (
        "cometml",
        "file_logger",
        "in_memory_logger",
        "inmemory_logger",
        "mosaicml",
        "neptune",
    )
)
"""Ignored in loggers: unsupported trackers. metrics.jsonl is always written."""

LOGGER = frozenset(
    (
        "flush_interval",
        "init_kwargs",
        "log_artifacts",
        "log_system_metrics",
        "model_registry_prefix",
        "model_registry_uri",
        "rank_zero_only",
        "rename_metrics",
        "resume",
        "synchronous",
    )
)
"""Ignored in a logger: uploads, and options whose behaviour is built in."""

_VARIABLE = "put it under variables, and write ${{variables.{0}}} where it is used"

INSTEAD = {
    "tokenizer_name": "say tokenizer: {name: bytes}",
    "global_seed": _VARIABLE.format("global_seed"),
    "data_local": _VARIABLE.format("data_local"),
    "data_remote": _VARIABLE.format("data_remote"),
    "train_loader.dataset.remote": "bring the shards here and name their folder by dataset.local",
    "train_loader.dataset.hf_kwargs": "name a folder or a dataset by hf_name, its split by split",
    "train_loader.dataset.preprocessing_fn": "no code of a config is run; write rows of messages, "
    "or of prompt and response",
    "callbacks.generate_callback.kwargs": "say max_new_tokens and temperature beside prompts",
    "callbacks.generate_callback.batch_size": "leave it out; prompts are continued one by one",
}
"""Refused keys of LLM Foundry, in all its spellings, and what to write instead."""

_LION = "Lion is not here; say decoupled_adamw or adamw, with a learning rate of its own"
_HF_MODEL = "say load_path: hf://folder, which brings the model, and leave model.name out"
_TEXT_ONLY = "only whole documents are read here; say name: text, or name: finetuning"

INSTEAD_OF_VALUES = {
    "model.name": {
        "hf_causal_lm": _HF_MODEL,
        "hf_prefix_lm": _HF_MODEL,
        "hf_t5": "encoder-decoder models are not here; say load_path: hf://folder of a decoder",
    },
    "optimizer.name": {
        "adalr_lion": _LION,
        "clip_lion": _LION,
        "decoupled_lionw": _LION,
        "decoupled_lionw_8b": _LION,
        "no_op": "say frozen: [patterns] for parameters that are not trained",
    },
    "scheduler.name": {
        "inv_sqrt_with_warmup": "say cosine_with_warmup, linear_decay_with_warmup or "
        "constant_with_warmup",
    },
    "train_loader.name": {
        "denoising": _TEXT_ONLY,
        "text_denoising": _TEXT_ONLY,
    },
}
"""Values of LLM Foundry that are not here, by key, and what to write instead."""

RENAMED = {"deterministic_mode": "deterministic"}
"""Composer's top-level keys that have another name here, and that name."""
