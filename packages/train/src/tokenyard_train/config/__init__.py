"""Read the training config and resolve its defaults."""

from tokenyard_train.config.duration import Span, parse_span
from tokenyard_train.config.load import load_config, read_config
from tokenyard_train.config.resolve import resolve
from tokenyard_train.config.schema import TrainConfig

__all__ = ["Span", "TrainConfig", "load_config", "parse_span", "read_config", "resolve"]
