"""A model with weights, its precision and its tokenizer."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Self

from tokenyard import Model
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.data import Tokenizer, build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.stop_ids import tokenizer_stop_ids
from tokenyard_train.engine.precision import computing_in

log = logging.getLogger("tokenyard")


class LoadedModel(NamedTuple):
    """A model with weights, its precision and its tokenizer."""

    model: Model
    precision: str | None  # a config's precision; None: the dtype of the weights
    tokenizer: TokenizerConfig
    path: Path  # the checkpoint, or the Hugging Face folder
    tokenizer_digest: str | None = None  # of the tokenizer that a checkpoint was trained with
    saved_stop_ids: frozenset[int] | None = None  # that a checkpoint records; None: nothing
    chat_template: str | None = None  # the file that a run was trained with; None: the tokenizer's
    source: Path | None = None  # the Hugging Face folder of the model, or that its run started from

    def autocast(self) -> AbstractContextManager[None]:
        """Context: call the model inside it to compute in the model's precision."""
        return computing_in(self.precision or "fp32", next(self.model.parameters()).device)

    def with_tokenizer(self, name: str | None) -> Self:
        """Return the model with the tokenizer of another name. None keeps the model's own."""
        if name is None:
            return self
        return self._replace(
            tokenizer=TokenizerConfig(name=name),
            tokenizer_digest=None,
            saved_stop_ids=None,
            chat_template=None,
        )

    def build_tokenizer(self) -> Tokenizer:
        """Build the tokenizer.

        Raises ConfigError if it is unusable, and CheckpointError if it has other content than the
        checkpoint was trained with.
        """
        tokenizer = build_tokenizer(self.tokenizer)
        if self.tokenizer_digest not in (None, tokenizer.identity):
            raise CheckpointError(
                f"the tokenizer {self.tokenizer.name!r} has other content than checkpoint "
                f"{self.path} was trained with; bring the former content back, or name a "
                "tokenizer by --tokenizer"
            )
        return tokenizer

    def stop_ids(self) -> frozenset[int]:
        """Return the ids that end a document in addition to the tokenizer's end.

        They are those of the generation_config.json beside the tokenizer. A warning says if the
        checkpoint recorded others.
        """
        ids = tokenizer_stop_ids(self.tokenizer)
        if self.saved_stop_ids not in (None, ids):
            log.warning(
                "the generation_config.json beside the tokenizer %r has the end ids %s, and "
                "checkpoint %s was saved with %s; those of the file are used",
                self.tokenizer.name,
                sorted(ids),
                self.path,
                sorted(self.saved_stop_ids or ()),
            )
        return ids
