"""Generating by a model that stands on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.data import build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.engine.sampling import continue_texts


def generate(
    path: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokenizer: str | None = None,
    device: str = "auto",
    precision: str | None = None,
) -> list[str]:
    """Return how the model of a run, or of a Hugging Face folder, continues each prompt.

    `tokenizer` is a name or path in place of the model's own; `device` and `precision` are those of `load_trained`.
    Raises TokenyardError.
    """
    found = load_trained(path, device, precision)
    reads = build_tokenizer(
        found.tokenizer if tokenizer is None else TokenizerConfig(name=tokenizer)
    )
    with found.computing():
        return continue_texts(
            found.model, reads, prompts, max_new_tokens, temperature, seed, found.stops
        )
