"""The training config. Keys have LLM Foundry's names where the concept is the same.

Unknown keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tokenyard import LoraSettings
from tokenyard.lora import ALL_LINEAR
from tokenyard_train.config import foundry
from tokenyard_train.config.callbacks import Callbacks, Count
from tokenyard_train.config.duration import Duration, Span
from tokenyard_train.config.habits import HABITS
from tokenyard_train.config.loggers import Loggers
from tokenyard_train.config.optimizer import OptimizerConfig
from tokenyard_train.config.scheduler import SchedulerConfig
from tokenyard_train.data.paths import LocalPath, WeightsPath
from tokenyard_train.data.schema import DataSettings, LoaderConfig, Section, TokenizerConfig

BackendSetting = str | dict[str, Any]


def _check_run_name(run_name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_name):
        raise ValueError(
            "it names a folder, so give letters, digits, dots, dashes and underscores only"
        )
    return run_name


RunName = Annotated[
    str,
    BeforeValidator(lambda name: "run" if name is None else name),
    AfterValidator(_check_run_name),
]
"""A name for the run's folder. An empty `run_name:`, as in LLM Foundry's files, is the default."""


def _check_label(label: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", label):
        raise ValueError("a label has letters, digits, dots, slashes, dashes and underscores only")
    return label


Label = Annotated[str, AfterValidator(_check_label)]


class GradientClipping(Section):
    """Scale all gradients down when their global norm exceeds the threshold."""

    clipping_type: Literal["norm"] = "norm"  # one norm over all parameters
    clipping_threshold: float = Field(1.0, ge=1e-9)  # largest norm that is not scaled


class Algorithms(Section):
    """Changes to the training step."""

    ignored: ClassVar[frozenset[str]] = foundry.ALGORITHMS

    gradient_clipping: GradientClipping | None = None


class LoraConfig(Section):
    """LoRA adapters: y = x W^T + alpha / rank * (x A^T) B^T. Trains A, B and `train_also` only."""

    rank: Count = 8  # rank of the adapters: rows of A, columns of B
    alpha: float = Field(16.0, gt=0, le=1e6)  # adapters are scaled by alpha / rank
    targets: list[str] | str = Field(
        # name patterns of weights that get adapters, such as attention.* or experts.up;
        # all-linear: those of attention, experts, shared experts and dense layers
        ALL_LINEAR,
        min_length=1,
    )
    dropout: float = Field(0.0, ge=0, lt=1)  # of the input of A, while training
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead (rank-stabilised)
    train_also: list[str] = []  # name patterns of other parameters to train, such as *norm*

    def settings(self) -> LoraSettings:
        """Return the options of the adapters."""
        return LoraSettings(self.rank, self.alpha, self.dropout, self.use_rslora)


class Backends(Section):
    """The backend of each part: a name, "auto", or a mapping with `name` and its options."""

    router: BackendSetting = "auto"  # chooses experts for each token
    permutation: BackendSetting = "auto"  # sorts slots by expert
    experts: BackendSetting = "auto"  # computes the experts
    exchange: BackendSetting = "auto"  # moves tokens between expert-parallel ranks


class Parallel(Section):
    """Parallelism over devices."""

    strategy: BackendSetting = "single"  # single, ddp, fsdp, or a mapping with options
    expert_parallel: Count | None = (
        # expert-parallel ranks; the same as model.ffn_config.moe_world_size
        None
    )


class TrainConfig(Section):
    """One training run.

    `model`, `train_loader`, `max_duration` and `global_train_batch_size` are required.
    """

    ignored: ClassVar[frozenset[str]] = foundry.TOP

    @classmethod
    def habits(cls, where: str) -> Mapping[str, str]:
        """Return what to write here, by the keys of transformers, PEFT, Megatron and others."""
        return HABITS

    variables: dict[str, Any] = {}  # values for ${variables.x} in the same file
    run_name: RunName = "run"  # name of the run's folder
    seed: int = Field(17, ge=0, lt=2**63)  # seed of initial weights, shuffling and sampling
    device: str = "auto"  # cpu, cuda, or auto: cuda if available
    max_seq_len: Count = 1024  # tokens per sample; also the model's default
    model: dict[str, Any]  # `name`, and the keys of that model's own config
    tokenizer: TokenizerConfig = TokenizerConfig()
    train_loader: LoaderConfig
    eval_loader: LoaderConfig | None = None
    eval_loaders: dict[Label, LoaderConfig] = {}  # more held-out text, scored apart, by label
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    algorithms: Algorithms = Algorithms()
    max_duration: Duration  # length of the run
    eval_interval: Duration | None = None  # interval between evaluations; None: at the end only
    eval_first: bool = False  # evaluate before the first step too
    eval_subset_num_batches: int | None = (
        # held-out batches to score; -1: all; None: about 130,000 tokens
        None
    )
    device_eval_batch_size: Count | None = (
        # sequences per forward pass in evaluation; None: device_train_microbatch_size
        None
    )
    global_train_batch_size: Count  # sequences per optimizer step, over all ranks
    device_train_microbatch_size: Count | Literal["auto"] = (
        # sequences per forward pass and rank; auto: at most 16,384 tokens
        "auto"
    )
    precision: Literal["fp32", "amp_bf16", "bf16_master"] = (
        # amp_bf16: float32 weights, bfloat16 matmuls; bf16_master: bfloat16 weights and
        # activations, float32 masters in the optimizer
        "fp32"
    )
    deterministic: bool = (
        # equal runs end bit-identical; an operation without a deterministic algorithm is an error
        False
    )
    compile: bool = False  # compile each block by torch.compile
    cuda_graph: bool | Literal["auto"] = (
        # replay each microbatch as a CUDA graph; auto: on GPUs, unless something forbids it
        "auto"
    )
    activation_checkpointing: bool | Literal["selective"] = (
        # recompute blocks in the backward pass; selective: all but matmuls, attention and routing
        False
    )
    activation_cpu_offload: bool = False  # keep the inputs of recomputed blocks in host memory
    nonfinite: Literal["stop", "skip"] = (
        # action for a step whose loss or gradient is not finite
        "stop"
    )
    nonfinite_limit: Count = 10  # with skip: stop after this many such steps in a row
    save_folder: LocalPath | None = None  # folder of the run; None: runs/{run_name}
    save_interval: Duration | None = None  # interval between checkpoints; None: at the end only
    save_num_checkpoints_to_keep: int = -1  # newest checkpoints to keep; -1: all
    save_async: bool = False  # write checkpoints in the background, from a copy in host memory
    save_overwrite: bool = False  # delete an existing run in save_folder
    lora: LoraConfig | None = None  # train low-rank adapters instead of the weights
    frozen: list[str] = (
        # name patterns of parameters that are not trained, such as blocks.*.ffn.experts.*
        []
    )
    load_path: WeightsPath | None = (
        # initial weights of a new run: a checkpoint, or hf:// and a Hugging Face folder
        None
    )
    autoresume: bool = False  # resume from the newest good checkpoint in save_folder, if any
    console_log_interval: Duration = (
        # interval between printed lines when the output is not a terminal
        Span(1, "ba")
    )
    callbacks: Callbacks = Callbacks()
    loggers: Loggers = Loggers()
    backends: Backends = Backends()
    parallel: Parallel = Parallel()

    def data(self) -> DataSettings:
        """Return the data-related values."""
        return DataSettings(
            self.tokenizer,
            self.train_loader,
            self.eval_loader,
            self.max_seq_len,
            self.seed,
            self.device_eval_batch_size or 1,
            self.eval_subset_num_batches or -1,
            self.eval_loaders,
        )

    @model_validator(mode="after")
    def _check_ranges(self) -> TrainConfig:
        if self.max_duration.unit == "dur":
            raise ValueError(
                f"max_duration is {self.max_duration}; "
                "it takes ba (batches), ep (epochs) or tok (tokens)"
            )
        if self.activation_cpu_offload and not self.activation_checkpointing:
            raise ValueError(
                "activation_cpu_offload is true and activation_checkpointing is false; "
                "say true or selective, because only the inputs of recomputed blocks are offloaded"
            )
        if self.scheduler.t_max.value <= 0:
            raise ValueError(f"scheduler.t_max is {self.scheduler.t_max}; it must be above 0")
        if self.max_duration.value <= 0:
            raise ValueError(f"max_duration is {self.max_duration}; it must be above 0")
        for name in ("eval_interval", "save_interval", "console_log_interval"):
            span = getattr(self, name)
            if span is not None and span.value <= 0:
                raise ValueError(f"{name} is {span}; it must be above 0")
        for name in ("save_num_checkpoints_to_keep", "eval_subset_num_batches"):
            count = getattr(self, name)
            if count is not None and count < 1 and count != -1:
                raise ValueError(f"{name} is {count}; it must be -1 (all) or at least 1")
        return self
