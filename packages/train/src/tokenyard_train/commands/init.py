"""Write a commented config to start from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.errors import one_of
from tokenyard_cli.console import print_line
from tokenyard_train.commands.options import InitOptions
from tokenyard_train.data.paths import HF

_HEAD = """\
# tokenyard check {path}    prints size, memory and backends
# tokenyard train {path}    trains; key=value overrides a key: optimizer.lr=1e-3
# Every key is in docs/configuration.md.

run_name: {run_name}  # the folder of the run is runs/{run_name}
seed: 17
device: auto  # a GPU if there is one, else the CPU
"""

_DATA = """
# Data: the source of the installed Python; one file in 20 is held out.
# Text of your own, as .txt, .jsonl or .parquet:
#   train_loader: {name: text, dataset: {path: my-texts}}
train_loader: {name: python_stdlib}
"""

_TEXT = """
# Data: files, and folders of .txt. `tokenyard data pack` prepares large text.
train_loader: {{name: text, dataset: {{path: {data}}}}}
# eval_loader: {{name: text, dataset: {{path: held-out-texts}}}}
"""

_PRETRAIN = """
max_seq_len: 256  # tokens per sample
tokenizer: {name: bytes}  # or the path of a tokenizer.json

# Length: ba are batches, ep epochs, tok tokens
max_duration: 400ba
global_train_batch_size: 16  # samples per optimizer step, over all ranks
device_train_microbatch_size: auto  # samples per forward pass and rank
optimizer: {name: adamw, lr: 3.0e-3, betas: [0.9, 0.95], weight_decay: 0.1}
scheduler: {name: cosine_with_warmup, t_warmup: 20ba, alpha_f: 0.1}
"""

_FINETUNE = """
# Model and tokenizer: those of a Hugging Face folder.
load_path: {base}

# Data: rows of messages, or of prompt and response. The loss counts answers only.
train_loader: {{name: finetuning, dataset: {{path: {data}}}}}
# max_seq_len: 1024  # tokens of a sample, in which documents are packed

# Adapters. Without this section, all weights are trained, at a lower learning rate.
lora: {{rank: 16, alpha: 32}}

# Length: ba are batches, ep epochs, tok tokens
max_duration: 3ep
global_train_batch_size: 8  # samples per optimizer step, over all ranks
device_train_microbatch_size: auto  # samples per forward pass and rank
optimizer: {{name: adamw, lr: 1.0e-4}}
scheduler: {{name: cosine_with_warmup, t_warmup: 0.05dur, alpha_f: 0.1}}
"""

_TAIL = """\
algorithms: {{gradient_clipping: {{clipping_threshold: 1.0}}}}

precision: fp32  # on a GPU: {precision}
# activation_checkpointing: true  # less memory, a third more work

# eval_interval: 100ba  # default: at the end only
eval_subset_num_batches: 16
save_interval: 100ba
save_num_checkpoints_to_keep: 2
# autoresume: true  # resume the run if it exists
# loggers: {{tensorboard: {{}}}}  # or mlflow, wandb; metrics.jsonl is always written

# Several GPUs: tokenyard launch {path} --nproc 8, with
# parallel: {{strategy: fsdp, expert_parallel: 8}}
"""

_MODELS = {
    "quickstart": """
# Model: a small DBRX. Its other keys are in docs/model-keys.md.
model:
  name: dbrx
  size: tiny
  d_model: 128
  n_layers: 2
  ffn_config:
    ffn_hidden_size: 128  # width of an expert
    moe_num_experts: 16
    moe_top_k: 4  # experts per token
    moe_loss_weight: 0.05  # of the load-balancing loss
""",
    "dbrx": """
# Model. `size: full` has 131.6 B parameters, 36.5 B active.
model:
  name: dbrx
  size: tiny
  # d_model: 128
  # n_layers: 2
  # ffn_config: {moe_num_experts: 16, moe_top_k: 4}
""",
    "mixtral": """
# Model. `size: full` has 46.7 B parameters, 12.9 B active.
model:
  name: mixtral
  size: tiny
  # hidden_size: 128
  # num_hidden_layers: 2
  # num_local_experts: 8
  # num_experts_per_tok: 2
""",
    "olmoe": """
# Model. `size: full` has 6.9 B parameters, 1.3 B active.
model:
  name: olmoe
  size: tiny
  # hidden_size: 128
  # num_hidden_layers: 2
  # num_experts: 16
  # num_experts_per_tok: 4
""",
    "qwen3_moe": """
# Model. `size: full` has 30.5 B parameters, 3.4 B active.
model:
  name: qwen3_moe
  size: tiny
  # hidden_size: 128
  # num_hidden_layers: 2
  # num_experts: 16
  # num_experts_per_tok: 4
""",
}
"""The `model:` section of each `--model`."""


def init(options: InitOptions, console: Console) -> None:
    """Write the config. Raises ConfigError for an existing file, or a folder that is missing."""
    _check(options)
    text = "".join(_sections(options))
    try:
        with options.path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{options.path} exists already; give the name of a new file") from None
    except FileNotFoundError:
        raise ConfigError(
            f"{options.path} is in the folder {options.path.parent}, which does not exist; create "
            "the folder, or give another file"
        ) from None
    print_line(console, f"wrote {options.path}; next: tokenyard check {options.path}")


def _check(options: InitOptions) -> None:
    """Raise ConfigError for options that have no effect."""
    if options.finetune and options.model is not None:
        raise ConfigError("--model has no effect with --finetune; the model is that of --base")
    if options.base is not None and not options.finetune:
        raise ConfigError("--base has no effect without --finetune; add --finetune")
    if options.model is not None:
        one_of("--model", options.model, _MODELS)


def _sections(options: InitOptions) -> Iterator[str]:
    path = options.path
    run_name = re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "-", path.stem).strip("-.") or "run"
    yield _HEAD.format(path=path, run_name=_scalar(run_name))
    if options.finetune:
        base = options.base or "path/to/model"
        data = options.data or Path("chats.jsonl")
        yield _FINETUNE.format(
            base=_scalar(f"{HF}{base.removeprefix(HF)}"), data=_scalar(str(data))
        )
        yield _TAIL.format(path=path, precision="bf16_master, which halves frozen weights")
        return
    yield _MODELS[options.model or "quickstart"]
    yield _DATA if options.data is None else _TEXT.format(data=_scalar(str(options.data)))
    yield _PRETRAIN
    yield _TAIL.format(path=path, precision="amp_bf16, or bf16_master for less memory")


def _scalar(value: str) -> str:
    """Return a string as YAML, in quotes where it needs them."""
    text: str = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True)
    return text.strip()[1:-1]
