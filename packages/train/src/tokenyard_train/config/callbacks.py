"""The keys of the callbacks."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from tokenyard.errors import did_you_mean
from tokenyard_models.strict_config import Strict
from tokenyard_train.config import foundry
from tokenyard_train.config.duration import Duration, Span
from tokenyard_train.data.schema import Section

CALLBACKS = "tokenyard.callbacks"
"""The entry-point group through which installed distributions provide callbacks."""

Count = Annotated[int, Field(ge=1, le=10**9)]


class NgramBaselines(Strict):
    """Before training, score the held-out text with unigram and smoothed bigram models."""


def _check_temperature(temperature: float) -> float:
    if temperature and not 1e-4 <= temperature <= 1e4:
        raise ValueError("give 0 (greedy decoding), or a number from 0.0001 to 10000")
    return temperature


Temperature = Annotated[float, Field(ge=0), AfterValidator(_check_temperature)]


class GenerateCallback(Section):
    """Generate text from prompts at the end of the run, and every `interval`."""

    prompts: list[str] = Field(["def "], min_length=1)  # texts to continue
    interval: Duration | None = None  # interval between generations; None: at the end only
    max_new_tokens: Count = 200  # tokens to generate for each prompt
    temperature: Temperature = 0.8  # sampling temperature; 0: greedy decoding


def _epochs(patience: Any) -> Any:
    whole = isinstance(patience, int) and not isinstance(patience, bool)
    return f"{patience}ep" if whole else patience


def _check_patience(patience: Span) -> Span:
    if patience.unit not in ("ep", "ba"):
        raise ValueError("it counts epochs or batches; give ep or ba")
    return patience


Patience = Annotated[Duration, BeforeValidator(_epochs), AfterValidator(_check_patience)]


class EarlyStopperConfig(Section):
    """Stop when the held-out loss has not fallen for `patience`, as Composer's EarlyStopper."""

    monitor: Literal["LanguageCrossEntropy", "LanguagePerplexity", "loss", "bits_per_byte"] = (
        "loss"  # LanguageCrossEntropy is the loss
    )
    dataloader_label: str = "eval"  # eval, or a label of eval_loaders
    comp: Literal["less", "lt"] | None = None  # lower is better
    min_delta: float = Field(0.0, ge=0)  # an improvement is larger than this
    patience: Patience = Span(1, "ep")  # time without an improvement; a number counts epochs

    @model_validator(mode="after")
    def _lower_is_better(self) -> EarlyStopperConfig:
        if self.monitor == "LanguageCrossEntropy" and self.comp is None:
            raise ValueError(
                "its comp is not set, and Composer then stops a run whose LanguageCrossEntropy "
                "falls; say comp: less"
            )
        return self


class Callbacks(Strict):
    """Extra actions during a run. Other names are callbacks of installed distributions."""

    model_config = ConfigDict(extra="allow")
    ignored: ClassVar[frozenset[str]] = foundry.CALLBACKS

    ngram_baselines: NgramBaselines | None = None
    generate_callback: GenerateCallback | None = None
    early_stopper: EarlyStopperConfig | None = None

    @model_validator(mode="after")
    def _installed(self) -> Callbacks:
        installed = entry_points(group=CALLBACKS).names
        for name, options in (self.model_extra or {}).items():
            if options is not None and not isinstance(options, dict):
                raise ValueError(
                    f"callbacks.{name} is {options!r}; give a mapping of its options, such as {{}}"
                )
            if name not in installed:
                known = [*type(self).model_fields, *sorted(installed)]
                raise ValueError(
                    f"callbacks.{name} is not a known key{did_you_mean(name, known)}; "
                    f"known are: {', '.join(known)}; an installed distribution offers others as "
                    f"entry points of {CALLBACKS}"
                )
        return self
