"""Generate text from prompts during a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from tokenyard import ConfigError, Model, TokenyardError
from tokenyard_train.config.callbacks import GenerateCallback
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import Data
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.sampling import (
    Sampling,
    continue_texts,
    encode_prompts,
    warn_of_loss,
)
from tokenyard_train.engine.state import Run

log = logging.getLogger("tokenyard")


class TextGenerator(Callback):
    """Prints the model's continuation of each prompt."""

    def __init__(self, config: GenerateCallback):
        self.config = config

    def check(self, config: TrainConfig, model: Model, data: Data) -> None:
        """Raise ConfigError for a prompt that leaves the model no room."""
        try:
            encode_prompts(model, data.tokenizer, self.config.prompts)
        except ConfigError as error:
            raise ConfigError(f"callbacks.generate_callback.prompts: {error}") from None
        warn_of_loss(data.tokenizer, self.config.prompts, "callbacks.generate_callback.prompts")

    def batch_end(self, run: Run, record: Mapping[str, Any]) -> None:
        """Generate if the interval is due. `end` handles the last batch."""
        if run.due(self.config.interval) and not run.finished:
            self._generate(run)

    def end(self, run: Run) -> None:
        """Generate."""
        self._generate(run)

    def _generate(self, run: Run) -> None:
        setup = run.setup
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature, setup.config.seed)
        for prompt in self.config.prompts:
            try:
                with setup.precision():
                    (text,) = continue_texts(setup.model, setup.data.tokenizer, [prompt], sampling)
            except TokenyardError as error:
                log.warning("batch %d: no text is generated: %s", run.batch, error)
                continue
            setup.console.rule(f"batch {run.batch}: a sample")
            setup.console.print(f"[bold]{escape(prompt)}[/bold]{escape(text)}", highlight=False)
