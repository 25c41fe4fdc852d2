"""What else happens during a run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rich.markup import escape

from tokenyard import ConfigError
from tokenyard_train.baselines import ngram_baselines
from tokenyard_train.build import Run
from tokenyard_train.config.schema import CALLBACKS, Callbacks, GenerateCallback
from tokenyard_train.sampling import continue_texts


class Callback:
    """Something to do at certain moments of a run; a subclass overrides those that it cares for.

    Each process of a run calls its own, so what changes the run (`run.batches`, say) must be decided alike by all.

    Given to ``train(config, console, callbacks=[...])``, or offered by an installed distribution: an entry point of the
    group ``tokenyard.callbacks`` is called with the options that a config gives under ``callbacks``.
    """

    def start(self, run: Run) -> None:
        """Act before the first step of a run that is not resumed."""

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after a step, with its record, and after the evaluation if one was due."""

    def skipped(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after a step that was not taken since its loss or gradient was not finite, with its record."""

    def evaluated(self, run: Run, record: Mapping[str, Any]) -> None:
        """Act after an evaluation, with its record."""

    def saved(self, run: Run, checkpoint: Path) -> None:
        """Act after a checkpoint was saved."""

    def end(self, run: Run) -> None:
        """Act after the last step, when everything is saved."""


def build_callbacks(config: Callbacks) -> list[Callback]:
    """Return the callbacks that a config asks for: ours, and those of installed distributions.

    Raises ConfigError for options that an installed one refuses.
    """
    callbacks: list[Callback] = []
    if config.ngram_baselines is not None:
        callbacks.append(Baseline())
    if config.generate_callback is not None:
        callbacks.append(Generate(config.generate_callback))
    return callbacks + [_installed(name, options or {}) for name, options in (config.model_extra or {}).items()]


def _installed(name: str, options: Mapping[str, Any]) -> Callback:
    (point,) = entry_points(group=CALLBACKS, name=name)
    try:
        callback: Callback = point.load()(**options)
    except Exception as error:
        raise ConfigError(f"callbacks.{name} cannot be made of {dict(options)}: {error}") from error
    return callback


class Baseline(Callback):
    """Scores the held-out text by counting, into metrics.jsonl."""

    def start(self, run: Run) -> None:
        """Fit, score and record."""
        if run.data.held_out is not None:
            scores = ngram_baselines(run.data.train, run.data.held_out, run.data.tokenizer)
            run.metrics.write({"kind": "baselines", **scores._asdict()})


class Generate(Callback):
    """Prints how the model continues some prompts."""

    def __init__(self, config: GenerateCallback):
        self.config = config

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        """Generate if the interval says so; the end has its own turn."""
        if run.due(self.config.interval) and run.batch < run.batches:
            self._generate(run)

    def end(self, run: Run) -> None:
        """Generate."""
        self._generate(run)

    def _generate(self, run: Run) -> None:
        c = self.config
        for prompt in c.prompts:
            with run.precision():
                (text,) = continue_texts(
                    run.model, run.data.tokenizer, [prompt], c.max_new_tokens, c.temperature, run.config.seed
                )
            run.console.rule(f"batch {run.batch}: a sample")
            run.console.print(f"[bold]{escape(prompt)}[/bold]{escape(text)}", highlight=False)
