"""Keys of LLM Foundry's loaders, datasets and tokenizers that are ignored with a warning."""

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
"""In train_loader and eval_loader. Samples are read by index, without worker processes."""

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
        "num_canonical_nodes",
        "partition_algo",
        "predownload",
        "replication",
        "shuffle_algo",
        "shuffle_block_size",
        "shuffle_seed",
        "validate_hash",
    )
)
"""In a loader's dataset: options for fetching and shuffling shards.

bos_token_id and eos_token_id mask attention between documents where the model has
attn_uses_sequence_id, which is refused.
"""

FINETUNING = frozenset(
    (
        "allow_pad_trimming",
        "auto_packing_replication",
        "max_leftover_bins_to_keep",
        "pad_to_longest",
        "safe_load",
        "seq_parallel_replication",
    )
)
"""In the dataset of a finetuning loader: padding, and how rows are packed and spread over ranks."""

TOKENIZER_KWARGS = frozenset(
    ("add_eos_token", "model_max_length", "padding_side", "trust_remote_code")
)
"""In tokenizer.kwargs. Documents are cut into windows of max_seq_len, and nothing is padded."""

BLANK = frozenset(("hf_kwargs", "remote"))
"""Keys of a loader's dataset and its streams that must have no value."""
