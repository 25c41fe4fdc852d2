"""Describe how Hugging Face folders of one `model_type` store a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenyard_models.config import TransformerConfig
from tokenyard_models.families._boxes import Operation
from tokenyard_models.families._definition import Definition
from tokenyard_models.families._foreign_keys import without_foreign
from tokenyard_models.strict_config import merged


class Row(NamedTuple):
    """A row of a weight table. `{layer}` and `{expert}` stand for each number."""

    parameter: str  # name in the model
    keys: tuple[str, ...]  # names in the file
    operation: Operation  # builds the parameter from the keys


@dataclass(frozen=True)
class HfFormat:
    """The Hugging Face folders of one `model_type`."""

    definition: type[Definition]
    model_type: str
    weights: tuple[Row, ...]  # as published: one tensor for each expert
    config_json: Callable[[TransformerConfig], dict[str, Any]]
    defaults: Mapping[str, Any]  # of transformers, where they differ from the definition's
    fused: tuple[Row, ...] = ()  # replace rows of `weights`: one tensor for all experts
    fused_suffix: str = ""  # of a name that only the fused form has
    renamed: Mapping[str, str] = field(default_factory=dict)  # config.json key -> schema key
    upcycled: str = ""  # of a dense format: the `model_type` with experts
    refuses: Callable[[TransformerConfig], str | None] = lambda config: None
    """Why transformers refuses to load a model of this config, or None."""

    @property
    def name(self) -> str:
        """Return the definition's name, as configs use it."""
        return self.definition.definition

    def rows(self, fused: bool) -> list[Row]:
        """Return the weight table of the published or the fused form."""
        replaced = {row.parameter: row for row in self.fused} if fused else {}
        return [replaced.get(row.parameter, row) for row in self.weights]

    def section(
        self, config: Mapping[str, Any], unknown: list[str] | None = None
    ) -> dict[str, Any]:
        """Convert a config.json to the `model:` section of a config.

        Appends the paths of unknown keys, which are left out, to `unknown`. Raises ConfigError for
        a key that changes what a model computes and is not supported.
        """
        keys = {self.renamed.get(key, key): value for key, value in config.items()}
        left_out = [] if unknown is None else unknown
        return without_foreign(
            self.definition.schema, merged(self.defaults, keys), "model", left_out
        )
