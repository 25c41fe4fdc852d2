"""The training config: LLM Foundry's key names where the concept is the same, and everything else refused."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from tokenyard.errors import did_you_mean
from tokenyard_models.schema import Strict
from tokenyard_train.config import foundry
from tokenyard_train.config.duration import Duration, Span
from tokenyard_train.config.loggers import Loggers
from tokenyard_train.data.schema import DataSettings, LoaderConfig, TokenizerConfig

CALLBACKS = "tokenyard.callbacks"
"""The group of entry points by which installed distributions offer callbacks."""

BackendChoice = str | dict[str, Any]
Count = Annotated[int, Field(ge=1, le=10**9)]


def _named(run_name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_name):
        raise ValueError(
            "it names a folder, so give letters, digits, dots, dashes and underscores only"
        )
    return run_name


RunName = Annotated[
    str, BeforeValidator(lambda name: "run" if name is None else name), AfterValidator(_named)
]
"""An empty `run_name:`, which LLM Foundry's files have, is the default."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Strict):
    """AdamW. `decoupled_adamw` (Composer's) scales weight decay by lr / initial lr, `adamw` (torch's) by lr."""

    name: Literal["decoupled_adamw", "adamw"] = "decoupled_adamw"  # which of the two
    lr: float = Field(6e-4, gt=0)  # the highest learning rate
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # decay of the means of gradients and of their squares
    eps: float = Field(1e-8, gt=0)  # added to the root of the second mean
    weight_decay: float = Field(0.0, ge=0)  # share of a weight that is taken away in a step


Schedule = Literal["cosine_with_warmup", "linear_decay_with_warmup", "constant_with_warmup"]


class Scheduler(Strict):
    """How the learning rate changes: linear warm-up, then towards alpha_f of its peak at t_max."""

    name: Schedule = "cosine_with_warmup"  # the shape after warm-up
    t_warmup: Duration = Span(0, "ba")  # length of the warm-up
    t_max: Duration = Span(1, "dur")  # where alpha_f is reached
    alpha_f: float = Field(0.0, ge=0, le=1)  # the last learning rate, as a share of the highest


class GradientClipping(Strict):
    """Scale all gradients together when their global norm passes the threshold."""

    clipping_type: Literal["norm"] = "norm"  # by one norm over all parameters
    clipping_threshold: float = Field(1.0, gt=0)  # the highest norm that is left as it is


class Algorithms(Strict):
    """Changes to the training step."""

    ignored: ClassVar[frozenset[str]] = foundry.ALGORITHMS

    gradient_clipping: GradientClipping | None = None


class NgramBaselines(Strict):
    """Before training, score the held-out text by unigram and smoothed bigram models of the training text."""


class GenerateCallback(Strict):
    """Continue prompts with the model being trained, at the end and every `interval`."""

    prompts: list[str] = ["def "]  # texts to continue
    interval: Duration | None = None  # how often, besides at the end
    max_new_tokens: Count = 200  # of each continuation
    temperature: float = Field(0.8, ge=0)  # 0 takes the likeliest token


class Callbacks(Strict):
    """What else happens during a run; other names are those of installed distributions, with their options."""

    model_config = ConfigDict(extra="allow")
    ignored: ClassVar[frozenset[str]] = foundry.CALLBACKS

    ngram_baselines: NgramBaselines | None = None
    generate_callback: GenerateCallback | None = None

    @model_validator(mode="after")
    def _installed(self) -> Callbacks:
        installed = entry_points(group=CALLBACKS).names
        for name in self.model_extra or {}:
            if name not in installed:
                known = [*type(self).model_fields, *sorted(installed)]
                raise ValueError(
                    f"callbacks.{name} is not a known key{did_you_mean(name, known)}; known are: {', '.join(known)}; "
                    f"an installed distribution offers others as entry points of {CALLBACKS}"
                )
        return self


class Lora(Strict):
    """Adapters of the experts' weights, W + alpha / rank * B A; what else is trained, `train_also` says."""

    rank: Count = 8  # rows of A, columns of B
    alpha: float = Field(16.0, gt=0)  # the adapters count alpha / rank
    targets: list[Literal["up", "down"]] = Field(
        ["up", "down"], min_length=1
    )  # weights that get adapters
    train_also: list[str] = []  # patterns of names of parameters, such as *norm*


class Backends(Strict):
    """Who computes each piece: a backend's name, "auto", or a mapping with `name` and its options."""

    router: BackendChoice = "auto"  # chooses experts
    permutation: BackendChoice = "auto"  # lines slots up by expert
    experts: BackendChoice = "auto"  # computes the experts
    exchange: BackendChoice = "auto"  # carries tokens between ranks


class Parallel(Strict):
    """How the model is laid out over devices."""

    strategy: BackendChoice = "single"  # single, ddp or fsdp, or a mapping with options
    expert_parallel: Count | None = (
        None  # ranks that share the experts; model.ffn_config.moe_world_size says the same
    )


class TrainConfig(Strict):
    """One training run. Only `model`, `train_loader`, `max_duration` and `global_train_batch_size` have no default."""

    ignored: ClassVar[frozenset[str]] = foundry.TOP

    variables: dict[str, Any] = {}  # for ${variables.x} in the same file
    run_name: RunName = "run"  # names the folder of the run
    seed: int = Field(17, ge=0, lt=2**63)  # of initial weights, shuffling and sampling
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    max_seq_len: Count = 1024  # tokens of a sample; goes into the model
    model: dict[str, Any]  # `name`, and what that model's own config declares
    tokenizer: TokenizerConfig = TokenizerConfig()
    train_loader: LoaderConfig
    eval_loader: LoaderConfig | None = None
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    algorithms: Algorithms = Algorithms()
    max_duration: Duration  # length of the run
    eval_interval: Duration | None = None  # None: at the end only
    eval_subset_num_batches: int | None = (
        None  # of held-out text to score; -1: all; None: some 130,000 tokens
    )
    device_eval_batch_size: Count | None = None  # None: device_train_microbatch_size
    global_train_batch_size: Count  # sequences per optimizer step, over all ranks
    device_train_microbatch_size: Count | Literal["auto"] = (
        "auto"  # sequences per forward; auto: up to 16,384 tokens
    )
    precision: Literal["fp32", "amp_bf16"] = "fp32"  # amp_bf16: float32 weights, bfloat16 products
    deterministic: bool = (
        False  # equal runs end bit-identical; what cannot repeat is refused by name
    )
    activation_checkpointing: bool = False  # recompute blocks in the backward pass
    nonfinite: Literal["stop", "skip"] = (
        "stop"  # what to do with a step whose loss or gradient is not finite
    )
    nonfinite_limit: Count = 10  # with skip: so many such steps in a row stop the run, too
    save_folder: str | None = None  # None: runs/{run_name}
    save_interval: Duration | None = None  # None: at the end only
    save_num_checkpoints_to_keep: int = -1  # the newest ones; -1: all
    save_async: bool = (
        False  # write checkpoints while training goes on, from a copy in the host's memory
    )
    save_overwrite: bool = False  # delete a run that already stands in save_folder
    lora: Lora | None = None  # adapters of the experts, which alone are trained
    frozen: list[
        str
    ] = []  # patterns of names of parameters that are not trained, such as blocks.*.ffn.experts.*
    load_path: str | None = (
        None  # a checkpoint, or hf:// and a Hugging Face folder, that a new run starts from
    )
    autoresume: bool = (
        False  # go on with the newest good checkpoint in save_folder, if there is one
    )
    console_log_interval: Duration = Span(
        1, "ba"
    )  # how often a line is printed where there is no terminal
    callbacks: Callbacks = Callbacks()
    loggers: Loggers = Loggers()
    backends: Backends = Backends()
    parallel: Parallel = Parallel()

    def data(self) -> DataSettings:
        """Return what this says of data."""
        return DataSettings(
            self.tokenizer,
            self.train_loader,
            self.eval_loader,
            self.max_seq_len,
            self.seed,
            self.device_eval_batch_size or 1,
            self.eval_subset_num_batches or -1,
        )

    @model_validator(mode="after")
    def _durations(self) -> TrainConfig:
        if self.max_duration.unit == "dur":
            raise ValueError(
                f"max_duration is {self.max_duration}; it takes ba (batches), ep (epochs) or tok (tokens)"
            )
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
