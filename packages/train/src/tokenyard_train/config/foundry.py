"""Keys of LLM Foundry that are ignored, renamed, or refused with the key to use instead."""

from __future__ import annotations

TOP = frozenset(
    (
        "accumulate_train_batch_on_tokens",
        "activation_checkpointing_reentrant",
        "compile_config",
        "cuda_load_lazy",
        "deepspeed_config",
        "device_eval_microbatch_size",
        "device_train_batch_size",
        "device_train_grad_accum",
        "dist_timeout",
        "eval_gauntlet",
        "eval_gauntlet_str",
        "expandable_segments",
        "flatten_imports",
        "flatten_metadata",
        "icl_max_seq_len",
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
    )
)
"""Ignored top-level keys: logging, profiling, file names, in-context evaluation."""

ALGORITHMS = frozenset(("low_precision_layernorm",))
"""Ignored in algorithms: it selects kernels and does not change the result."""

CALLBACKS = frozenset(
    (
        "activation_monitor",
        "activation_monitor_full_model",
        "async_eval",
        "env_logger",
        "env_logging",
        "eval_output_logging",
        "export_for_inference",
        "fdiff",
        "fdiff_metrics",
        "loss_perp_v_len",
        "mbmoe_tok_per_expert",
        "memory_snapshot",
        "mono_checkpoint_saver",
        "monolithic_ckpt_callback",
        "nan_monitor",
        "oom_observer",
        "optimizer_monitor",
        "run_timeout",
        "scheduled_gc",
        "system_metrics_monitor",
    )
)
"""Ignored in callbacks: those that only observe.

A callback that changes the training, such as layer_freezing, is refused like any unknown key.
"""

RECORDED = {
    "lr_monitor": "metrics.jsonl has the learning rate of each step, as lr",
    "memory_monitor": "metrics.jsonl has the most bytes that a GPU has held, as peak_bytes",
    "runtime_estimator": "metrics.jsonl has the time that is left, as remaining_s",
    "speed_monitor": "metrics.jsonl has tokens_per_s and flops_per_s of each step",
}
"""Callbacks of Composer whose numbers every run records."""

LEFT_OUT = {
    "hf_checkpointer": "left out; run `tokenyard convert RUN OUT` after the run",
}
"""Callbacks with files of their own that no run writes, and what to do instead."""

LOGGERS = frozenset(
    (
        "cometml",
        "file_logger",
        "in_memory_logger",
        "inmemory",
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
_PROPORTION = "give proportion, the share of a stream in the samples"
_SECOND_RUN = "a run reads one train_loader; start another run by load_path"

INSTEAD = {
    "tokenizer_name": "say tokenizer: {name: bytes}",
    "global_seed": _VARIABLE.format("global_seed"),
    "data_local": _VARIABLE.format("data_local"),
    "data_remote": _VARIABLE.format("data_remote"),
    "code_paths": "no code of a config is run; install it as a distribution with entry points",
    "tp_config": "leave it out; parallel shards experts and whole parameters",
    "train_subset_num_batches": "give max_duration in ba",
    "train_loader.dataset.remote": "bring the shards here and name their folder by dataset.local",
    "train_loader.dataset.hf_kwargs": "name a folder or a dataset by hf_name, its split by split",
    "train_loader.dataset.preprocessing_fn": "no code of a config is run; write rows of messages, "
    "or of prompt and response",
    "model.peft_config": "say lora: {rank: 8, alpha: 16}, or name: hf_causal_lm",
    "train_loader.dataset.choose": _PROPORTION,
    "train_loader.dataset.repeat": _PROPORTION,
    "train_loader.dataset.epoch_size": "give max_duration in ba or tok",
    "optimizer.disable_grad": "say frozen: [patterns] for parameters that are not trained",
    "optimizer.param_groups": "all parameters have the options of optimizer",
    "callbacks.curriculum_learning": _SECOND_RUN,
    "callbacks.dataset_swap": _SECOND_RUN,
    "callbacks.global_lr_scaling": "set optimizer.lr",
    "callbacks.layer_freezing": "say frozen: [patterns] for parameters that are not trained",
    "callbacks.load_checkpoint": "say load_path",
    "callbacks.generate_callback.kwargs": "say max_new_tokens and temperature beside prompts",
    "callbacks.generate_callback.batch_size": "leave it out; prompts are continued one by one",
}
"""Refused keys of LLM Foundry, in all its spellings, and what to write instead."""

_LION = "say decoupled_lionw, or adamw with a learning rate of its own"
_TEXT_ONLY = "only whole documents are read here; say name: text, or name: finetuning"

INSTEAD_OF_VALUES = {
    "model.name": {
        "hf_prefix_lm": "prefix language models are not here; say hf_causal_lm",
        "hf_t5": "encoder-decoder models are not here; say hf_causal_lm, name a decoder, "
        "and set decoder_only_format: true",
    },
    "optimizer.name": {
        "adalr_lion": _LION,
        "clip_lion": _LION,
        "decoupled_lionw_8b": "say decoupled_lionw with moments: 8bit",
        "no_op": "say frozen: [patterns] for parameters that are not trained",
    },
    "train_loader.name": {
        "denoising": _TEXT_ONLY,
        "text_denoising": _TEXT_ONLY,
    },
}
"""Values of LLM Foundry that are not here, by key, and what to write instead."""

VARIABLES = frozenset(("data_local", "data_remote", "global_seed", "tokenizer_name"))
"""Top-level keys of older files that are variables if the file refers to them."""

KNOWN = (TOP | {"fsdp_config"} | {key for key in INSTEAD if "." not in key}) - VARIABLES
"""All other top-level keys of LLM Foundry that are not known here by the same name."""

RENAMED = {"deterministic_mode": "deterministic"}
"""Composer's top-level keys that have another name here, and that name."""
