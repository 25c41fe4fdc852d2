"""Generate text with a saved model."""

from __future__ import annotations

from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.data import build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.engine.sampling import Sampling, continue_texts


def generate(options: GenerateOptions) -> list[str]:
    """Return the continuation of each prompt, without the prompt.

    `device` and `precision` are those of `load_trained`. Raises TokenyardError.
    """
    loaded = load_trained(options.model, options.device, options.precision, options.base)
    if options.tokenizer is None:
        tokenizer = build_tokenizer(loaded.tokenizer)
    else:
        tokenizer = build_tokenizer(TokenizerConfig(name=options.tokenizer))
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed, loaded.stops)
    with loaded.autocast():
        return continue_texts(loaded.model, tokenizer, options.prompts, sampling)
