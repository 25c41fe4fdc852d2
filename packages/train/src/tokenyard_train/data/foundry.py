"""Keys of LLM Foundry that loaders, datasets and tokenizers here do without; they are ignored with a warning."""

from __future__ import annotations

LOADER = frozenset(
    (
        "drop_last",
        "label",
        "num_workers",
        "persistent_workers",
        "pin_memory",
        "prefetch_factor",
        "timeout",
    )
)
"""In train_loader and eval_loader: samples here are read by index, in the process itself."""

DATASET = frozenset(
    (
        "allow_unsafe_types",
        "batching_method",
        "bos_token_id",
        "cache_limit",
        "download_retry",
        "download_timeout",
        "eos_token_id",
        "keep_zip",
        "max_seq_len",
        "num_canonical_nodes",
        "partition_algo",
        "predownload",
        "replication",
        "shuffle_algo",
        "shuffle_block_size",
        "shuffle_seed",
        "token_encoding_type",
        "validate_hash",
    )
)
"""In a loader's dataset: how streaming fetches and shuffles shards."""

TOKENIZER_KWARGS = frozenset(
    ("add_bos_token", "add_eos_token", "model_max_length", "padding_side", "trust_remote_code")
)
"""In tokenizer.kwargs: documents are cut where training cuts them, and nothing is padded."""
