"""LLM Foundry's keys that mean nothing here: accepted, and named in a warning."""

from __future__ import annotations

TOP = frozenset(
    (
        "activation_checkpointing_reentrant",
        "accumulate_train_batch_on_tokens",
        "code_paths",
        "compile_config",
        "dist_timeout",
        "expandable_segments",
        "flatten_imports",
        "fsdp_config",
        "icl_tasks",
        "load_ignore_keys",
        "load_strict_model_weights",
        "load_weights_only",
        "log_config",
        "log_to_console",
        "max_split_size_mb",
        "metadata",
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
"""At the top of the file."""

LOADER = frozenset(
    ("drop_last", "num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "timeout", "label")
)
"""In train_loader and eval_loader: samples here are read by index, in the process itself."""

DATASET = frozenset(("eos_token_id", "max_seq_len", "predownload", "shuffle_algo", "shuffle_seed", "split", "streams"))
"""In a loader's dataset."""

CALLBACKS = frozenset(
    (
        "curriculum_learning",
        "early_stopper",
        "eval_output_logging",
        "hf_checkpointer",
        "load_checkpoint",
        "lr_monitor",
        "mbmoe_tok_per_expert",
        "memory_monitor",
        "memory_snapshot",
        "monolithic_ckpt_callback",
        "oom_observer",
        "optimizer_monitor",
        "runtime_estimator",
        "scheduled_gc",
        "speed_monitor",
        "system_metrics_monitor",
    )
)
"""In callbacks: what several of these report is in metrics.jsonl anyway."""

LOGGERS = frozenset(("mlflow", "mosaicml", "tensorboard", "wandb"))
"""In loggers: no tracker is supported yet; metrics.jsonl is always written."""

TOKENIZER = frozenset(("kwargs",))
"""In tokenizer."""
