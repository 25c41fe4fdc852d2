"""Generate text with a saved model."""

from __future__ import annotations

from tokenyard import ConfigError
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.engine.sampling import Sampling, continue_texts, warn_of_loss


def generate(options: GenerateOptions) -> list[str]:
    """Return the continuation of each prompt, without the prompt.

    `device` and `precision` are those of `load_trained`. Raises TokenyardError.
    """
    for option in ("system", "chat_template"):
        if getattr(options, option) is not None:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} has no effect without --chat; add --chat")
    loaded = load_trained(options.model, options.device, options.precision, options.base)
    loaded = loaded.with_tokenizer(options.tokenizer)
    tokenizer = loaded.build_tokenizer()
    stops = loaded.stop_ids()
    warn_of_loss(tokenizer, options.prompts, "--prompt")
    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.seed, stops, warn_when_full=True
    )
    with loaded.autocast():
        return continue_texts(loaded.model, tokenizer, options.prompts, sampling)
