"""The keys and values of the 26 training files that LLM Foundry publishes in scripts/train/yamls.

`FILES` describes each file by what it sets beside the sections that all share. `build` makes the
config of a file, with its data and names of the hub as they are there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

DATA = {"data_local": "./my-copy-c4", "data_remote": None}
LENGTH = "${variables.max_seq_len}"
SEED = "${variables.global_seed}"
NEOX = "EleutherAI/gpt-neox-20b"
GPT_NEO = "EleutherAI/gpt-neo-125M"
DOLLY = "HuggingFaceH4/databricks_dolly_15k"
HHRLHF = "mosaicml/dolly_hhrlhf"
WORKERS = {
    "drop_last": True,
    "num_workers": 8,
    "pin_memory": False,
    "prefetch_factor": 2,
    "persistent_workers": True,
    "timeout": 0,
}
MONITORS: dict[str, Any] = {
    "speed_monitor": {"window_size": 10},
    "lr_monitor": {},
    "memory_monitor": {},
    "runtime_estimator": {},
}
FSDP = {
    "sharding_strategy": "FULL_SHARD",
    "mixed_precision": "PURE",
    "activation_checkpointing_reentrant": False,
    "activation_cpu_offload": False,
    "limit_all_gathers": True,
}


class File(NamedTuple):
    """What a file sets. `rest` holds whole sections that replace or join the shared ones."""

    model: dict[str, Any]
    lr: float
    duration: str
    interval: str | int  # eval_interval
    batch: int  # global_train_batch_size
    eval_batch: int | None = None  # device_eval_batch_size
    recompute: bool = False  # fsdp_config.activation_checkpointing
    tokenizer: str = NEOX
    length: int = 2048
    rest: Mapping[str, Any] = {}


def mpt(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    """The section of an MPT."""
    return {
        "name": "mpt_causal_lm",
        "init_device": "meta",
        "d_model": width,
        "n_heads": heads,
        "n_layers": layers,
        "expansion_ratio": 4,
        "max_seq_len": LENGTH,
        "vocab_size": 50368,
        "attn_config": {"attn_impl": "flash"},
    } | more


def hf(folder: str, pretrained: bool = True, **more: Any) -> dict[str, Any]:
    """The section of a Hugging Face model."""
    return {
        "name": "hf_causal_lm",
        "pretrained_model_name_or_path": folder,
        "pretrained": pretrained,
    } | more


def text(split: str, shuffle: bool, **more: Any) -> dict[str, Any]:
    """A loader of text in MDS shards."""
    dataset = {
        "local": "${variables.data_local}",
        "remote": "${variables.data_remote}",
        "split": split,
        "shuffle": shuffle,
        "max_seq_len": LENGTH,
        "shuffle_seed": SEED,
    }
    return {"name": "text", "dataset": dataset, "drop_last": shuffle, "num_workers": 8} | more


def rows(name: str, split: str = "train", **more: Any) -> dict[str, Any]:
    """A loader of prompts and responses."""
    dataset = {
        "hf_name": name,
        "split": split,
        "max_seq_len": LENGTH,
        "allow_pad_trimming": False,
        "decoder_only_format": True,
        "shuffle": split == "train",
    }
    return {"name": "finetuning", "dataset": dataset | more} | WORKERS


def adamw(lr: float, second: float = 0.95, decay: float = 0.0) -> dict[str, Any]:
    """The section of the optimizer that most files have."""
    return {
        "name": "decoupled_adamw",
        "lr": lr,
        "betas": [0.9, second],
        "eps": 1e-8,
        "weight_decay": decay,
    }


def linear(warmup: str) -> dict[str, Any]:
    """The schedule of supervised fine-tuning."""
    return {"name": "linear_decay_with_warmup", "t_warmup": warmup, "alpha_f": 0}


FLASH = {"attn_config": {"attn_impl": "flash", "attn_uses_sequence_id": False}}
SMALL = {"attn_config": {"attn_impl": "torch"}, "loss_fn": "torch_crossentropy"}
EXPERTS = {
    "ffn_type": "mb_dmoe",
    "memory_optimized_mlp": True,
    "mlp_impl": "grouped",
    "moe_lbl_in_fp32": False,
    "moe_loss_weight": 0.01,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_world_size": 1,
    "uniform_expert_assignment": False,
}
NO_EVAL: dict[str, Any] = {"eval_loader": None, "eval_first": None, "eval_subset_num_batches": None}
SFT = NO_EVAL | {
    "train_loader": rows(DOLLY),
    "scheduler": linear("0ba"),
    "optimizer": adamw(1e-5, 0.999, 0),
    "load_weights_only": True,
}
LION = {"name": "decoupled_lionw", "betas": [0.9, 0.95], "weight_decay": 1e-6}
DBRX = {
    "variables": {"icl_seq_len": 1024},
    "icl_seq_len": "${variables.icl_seq_len}",
    "train_loader": rows(HHRLHF, eos_token_id=0, packing_ratio="auto"),
    "eval_loader": rows(HHRLHF, "test", packing_ratio=None),
    "scheduler": {"name": "cosine_with_warmup", "alpha_f": 0, "t_warmup": "0.02dur"},
    "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1}},
    "eval_subset_num_batches": None,
    "dist_timeout": 3600,
    "expandable_segments": True,
    "fsdp_config": FSDP | {"state_dict_type": "sharded", "activation_checkpointing": True},
    "tokenizer": {
        "name": "databricks/dbrx-instruct",
        "kwargs": {"model_max_length": LENGTH, "trust_remote_code": True},
    },
    "callbacks": MONITORS
    | {
        "speed_monitor": {"window_size": 1},
        "hf_checkpointer": {
            "overwrite": True,
            "precision": "bfloat16",
            "save_folder": "./{run_name}/checkpoints",
            "save_interval": "1dur",
        },
    },
}
DBRX_MODEL = hf(
    "databricks/dbrx-instruct",
    init_device="mixed",
    use_auth_token=True,
    config_overrides={},
    use_flash_attention_2=True,
)
PEFT = {
    "r": 64,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "target_modules": ["Wqkv"],
}
ICL = {
    "icl_max_seq_len": "${variables.icl_max_seq_len}",
    "icl_tasks": [{"label": "piqa", "dataset_uri": None, "num_fewshot": [0], "batch_size": 4}],
}
GAUNTLET = {
    "icl_tasks": "eval/yamls/tasks_v0.2.yaml",
    "eval_gauntlet": "eval/yamls/eval_gauntlet_v0.2.yaml",
    "icl_seq_len": 1024,
}
LLAMA = "meta-llama/Meta-Llama-3-8B"
LLAMA_1 = "meta-llama/Meta-Llama-3.1-8B"

FILES = {
    "pretrain/mpt-125m": File(mpt(768, 12, 12), 6e-4, "4800ba", "500ba", 256, 16),
    "pretrain/mpt-350m": File(mpt(1024, 16, 24), 3e-4, "13400ba", "1000ba", 256, 8),
    "pretrain/mpt-760m": File(mpt(1536, 12, 24), 2.5e-4, "29000ba", "2000ba", 256, 4),
    "pretrain/mpt-1b": File(mpt(2048, 16, 24), 2e-4, "24800ba", "2000ba", 512, 4),
    "pretrain/mpt-3b": File(mpt(2560, 20, 32), 1.6e-4, "51500ba", "5000ba", 512, 8, True),
    "pretrain/mpt-7b": File(mpt(4096, 32, 32), 1.2e-4, "63900ba", "5000ba", 1024, 8, True),
    "pretrain/mpt-13b": File(mpt(5120, 40, 40), 1e-4, "124000ba", "5000ba", 1024, 8, True),
    "pretrain/mpt-30b": File(mpt(7168, 56, 48), 1e-4, "143100ba", "10000ba", 2048, 8, True),
    "pretrain/mpt-70b": File(mpt(8192, 64, 80), 8e-5, "333800ba", "10000ba", 2048, 4, True),
    "pretrain/testing": File(mpt(128, 2, 2, **SMALL), 6e-4, "200ba", "100ba", 256, 16, length=128),
    "pretrain/testing-moe": File(
        mpt(128, 2, 2, expansion_ratio=1, ffn_config=EXPERTS, **SMALL),
        *(6e-4, "200ba", "100ba", 256, 16),
        length=128,
        rest={"fsdp_config": FSDP | {"verbose": False}},
    ),
    "pretrain/mpt-small-cpu": File(
        mpt(16, 4, 4, init_device="cpu", expansion_ratio=5, **SMALL),
        *(6e-4, "10ba", "5ba", 256, 16),
        length=128,
        rest={
            "eval_subset_num_batches": 5,
            "autoresume": False,
            "precision": "fp32",
            "save_overwrite": True,
            "save_num_checkpoints_to_keep": 1,
        },
    ),
    "pretrain/gpt-neo-125m": File(
        hf(GPT_NEO, False, config_overrides={"max_position_embeddings": LENGTH}),
        *(6e-4, "4800ba", "500ba", 256, 4, False, "gpt2"),
    ),
    "pretrain/gpt-neo-125m_eval": File(
        hf(GPT_NEO, False, config_overrides={"max_position_embeddings": LENGTH}),
        *(6e-4, "4800ba", "500ba", 256, 4, False, GPT_NEO),
        rest=GAUNTLET,
    ),
    "pretrain/gpt2-small": File(
        hf("gpt2", False, config_overrides={"n_positions": LENGTH}),
        *(6e-4, "33696ba", "1000ba", 256, 4, False, "gpt2"),
    ),
    "pretrain/opt-3b": File(
        hf("facebook/opt-2.7b"),
        *(6e-4, "4800ba", "500ba", 256, 4, False, "facebook/opt-2.7b", 256),
    ),
    "pretrain/hf-llama-3.1-8B": File(
        hf(LLAMA_1, False, init_device="meta", use_auth_token=True, use_flash_attention_2=True),
        *(6e-4, "50ba", "100ba", 8, None, False, LLAMA_1),
        rest={
            "train_loader": text("train_small", True) | WORKERS,
            "eval_loader": None,
            "save_folder": None,
            "fsdp_config": FSDP
            | {"state_dict_type": "sharded", "backward_prefetch": "BACKWARD_PRE"},
            "dist_timeout": 6000,
            "expandable_segments": True,
        },
    ),
    "finetune/1b_local_data_sft": File(
        mpt(2048, 16, 24, **FLASH),
        *(1e-5, "1ep", "50ba", 128, 4),
        rest=SFT
        | {
            "train_loader": rows(
                "json",
                hf_kwargs={"data_dir": "/path/to/data/dir/"},
                preprocessing_fn="my.import.path:my_preprocessing_fn",
            ),
            "eval_loader": rows("json", "validation"),
            "load_path": "oci://my-bucket/my-folder/mpt-1b/checkpoints/some_checkpoint.pt",
        },
    ),
    "finetune/7b_dolly_sft": File(
        mpt(4096, 32, 32, **FLASH),
        *(1e-5, "1ep", 1, 64, 8, True),
        rest=SFT | {"load_path": "oci://my-bucket/my-folder/mpt-7b/checkpoints/some_checkpoint.pt"},
    ),
    "finetune/t5-small_dolly_sft": File(
        hf("t5-small", name="hf_t5"),
        *(1e-5, "1ep", 1, 64, 8, True, "t5-small", 1024),
        rest=SFT | {"train_loader": rows(DOLLY, decoder_only_format=False)},
    ),
    "finetune/mpt-7b_dolly_sft": File(
        hf(
            "mosaicml/mpt-7b",
            config_overrides=FLASH | {"max_seq_len": LENGTH},
            use_auth_token=False,
        ),
        *(5e-6, "2ep", "1ep", 48, 8, True, "mosaicml/mpt-7b"),
        rest={
            "train_loader": rows(HHRLHF),
            "eval_loader": rows(HHRLHF, "test"),
            "scheduler": linear("50ba"),
            "optimizer": adamw(5e-6, 0.999, 0),
            "eval_first": True,
        },
    ),
    "finetune/mpt-30b-instruct": File(
        hf("mosaicml/mpt-30b", init_device="mixed", config_overrides=FLASH),
        *(9.65e-6, "8ep", "1ep", 72, 4, True, "mosaicml/mpt-30b", 8192),
        rest=ICL
        | {
            "variables": {"icl_max_seq_len": 2048},
            "train_loader": rows("mosaicml/instruct-v3", packing_ratio=9),
            "eval_loader": rows("mosaicml/instruct-v3", "test", packing_ratio=9),
            "scheduler": linear("50ba"),
            "eval_first": True,
            "fsdp_config": FSDP | {"activation_checkpointing": True, "sync_module_states": True},
            "console_log_interval": "20ba",
        },
    ),
    "finetune/llama-3-8b_domain_adapt": File(
        hf(LLAMA, config_overrides=FLASH | {"max_seq_len": LENGTH}, use_auth_token=True),
        *(5e-5, "3195ba", "500ba", 1024, 8, True, LLAMA, 4096),
        rest={
            "train_loader": text("train_small", True),
            "eval_loader": text("val_small", False),
            "save_interval": "1000ba",
            "save_num_checkpoints_to_keep": 1,
            "save_folder": "./{run_name}/checkpoints",
            "load_weights_only": True,
        },
    ),
    "finetune/gpt2-arc-easy-cpu-streaming-dataset": File(
        hf("gpt2"),
        *(6e-4, "1ep", 1, 8, 8, False, "gpt2", 512),
        rest={
            "train_loader": {
                "name": "finetuning",
                "dataset": {
                    "streams": {
                        "my_data": {
                            "remote": "${variables.data_remote}",
                            "local": "${variables.data_local}",
                            "split": "train",
                        }
                    },
                    "shuffle": True,
                    "max_seq_len": LENGTH,
                    "decoder_only_format": True,
                },
                "drop_last": True,
                "num_workers": 8,
            },
            "eval_loader": None,
            "precision": "fp32",
            "fsdp_config": None,
        },
    ),
    "finetune/dbrx-full-ft": File(
        DBRX_MODEL,
        *(1e-6, "2ep", "1ep", 64, 1, True, "databricks/dbrx-instruct", 4096),
        rest=DBRX | {"optimizer": LION | {"lr": 1e-6}},
    ),
    "finetune/dbrx-lora-ft": File(
        DBRX_MODEL | {"peft_config": PEFT},
        *(1e-4, "2ep", "1ep", 16, 1, True, "databricks/dbrx-instruct", 4096),
        rest=DBRX | {"optimizer": LION | {"lr": 1e-4}},
    ),
}


def build(name: str) -> dict[str, Any]:
    """Return the config of a file. A key of `rest` that is None there is None in the config."""
    file = FILES[name]
    microbatch = file.eval_batch or 1
    config = {
        "max_seq_len": LENGTH,
        "run_name": "${variables.run_name}",
        "model": file.model,
        "tokenizer": {"name": file.tokenizer, "kwargs": {"model_max_length": LENGTH}},
        "train_loader": text("train", True),
        "eval_loader": text("val", False),
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "100ba", "alpha_f": 0.1},
        "optimizer": adamw(file.lr),
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": file.duration,
        "eval_interval": file.interval,
        "eval_first": False,
        "eval_subset_num_batches": -1,
        "global_train_batch_size": file.batch,
        "seed": SEED,
        "device_eval_batch_size": file.eval_batch,
        "device_train_microbatch_size": microbatch,
        "precision": "amp_bf16",
        "fsdp_config": FSDP | {"activation_checkpointing": file.recompute},
        "progress_bar": False,
        "log_to_console": True,
        "console_log_interval": "1ba",
        "callbacks": MONITORS,
    }
    variables = {**DATA, "max_seq_len": file.length, "global_seed": 17, "run_name": None}
    return {**config, **file.rest, "variables": variables | file.rest.get("variables", {})}
