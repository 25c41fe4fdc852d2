"""What else happens during a run."""

from __future__ import annotations

from typing import Protocol

from rich.markup import escape

from tokenyard_train.baselines import ngram_baselines
from tokenyard_train.build import Run
from tokenyard_train.config.schema import Callbacks, GenerateCallback
from tokenyard_train.sampling import continue_text


class Callback(Protocol):
    """Something to do at certain moments of a run."""

    def start(self, run: Run) -> None:
        """Act before the first step of a run that is not resumed."""
        ...

    def batch_end(self, run: Run) -> None:
        """Act after a step, its record, and the evaluation if one was due."""
        ...

    def end(self, run: Run) -> None:
        """Act after the last step, when everything is saved."""
        ...


def build_callbacks(config: Callbacks) -> list[Callback]:
    """Return the callbacks that a config asks for."""
    callbacks: list[Callback] = []
    if config.ngram_baselines is not None:
        callbacks.append(Baseline())
    if config.generate_callback is not None:
        callbacks.append(Generate(config.generate_callback))
    return callbacks


class Baseline:
    """Scores the held-out text by counting, into metrics.jsonl."""

    def start(self, run: Run) -> None:
        """Fit, score and record."""
        if run.data.held_out is not None:
            scores = ngram_baselines(run.data.train, run.data.held_out, run.data.tokenizer)
            run.metrics.write({"kind": "baselines", **scores._asdict()})

    def batch_end(self, run: Run) -> None:
        """Do nothing."""

    def end(self, run: Run) -> None:
        """Do nothing."""


class Generate:
    """Prints how the model continues some prompts."""

    def __init__(self, config: GenerateCallback):
        self.config = config

    def start(self, run: Run) -> None:
        """Do nothing."""

    def batch_end(self, run: Run) -> None:
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
                text = continue_text(
                    run.model, run.data.tokenizer, prompt, c.max_new_tokens, c.temperature, run.config.seed
                )
            run.console.rule(f"batch {run.batch}: a sample")
            run.console.print(f"[bold]{escape(prompt)}[/bold]{escape(text)}", highlight=False)
