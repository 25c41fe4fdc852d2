"""The base of all definitions: a transformer that is built from the keys of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tokenyard_models.config import TransformerConfig
from tokenyard_models.strict_config import Strict, merged, parse
from tokenyard_models.transformer import Transformer


class ModelConfig(Strict):
    """The keys of a `model:` section."""

    def resolve(self) -> TransformerConfig:
        """Return the config of the transformer. Raises ConfigError for contradicting keys."""
        raise NotImplementedError


class Definition(Transformer):
    """A transformer that a `model:` section describes.

    `config` holds the keys of the section; the other arguments are Transformer's.
    """

    schema: ClassVar[type[ModelConfig]]
    tiny: ClassVar[Mapping[str, Any]]  # the keys of `size: tiny`
    readme: ClassVar[tuple[str, str]]  # columns of the README's table: keys, sizes

    def __init__(self, config: Mapping[str, Any], **placement: Any):
        super().__init__(self.resolve(config), **placement)

    @classmethod
    def resolve(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read the keys of a `model:` section without building anything. Raises ConfigError."""
        return cls.read(config).resolve()

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Return the keys of a `model:` section with their defaults. Raises ConfigError."""
        keys = merged(cls.tiny, config) if config.get("size") == "tiny" else config
        return parse(cls.schema, keys, "model")
