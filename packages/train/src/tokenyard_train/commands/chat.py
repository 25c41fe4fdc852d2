"""Answer in a model's chat template: one turn, or a conversation on a terminal."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, TextIO

from tokenyard import ConfigError
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.loaded_model import LoadedModel
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.data import Tokenizer
from tokenyard_train.data.finetuning.conversation import prompt_segments
from tokenyard_train.data.finetuning.template import ChatTemplate, Message, read_template
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.sampling import (
    Sampling,
    check_vocabulary,
    continue_ids,
    utf8,
    warn_of_loss,
)

log = logging.getLogger("tokenyard")

_LOCATION = "the conversation"
_ANSWER = "tokenyard"  # a text that templates render as it is
_SPARE = 1024  # tokens of later turns, at most; attention reads the memory of each for every token


def run_chat(options: GenerateOptions, stdin: TextIO, show: Callable[[str], None]) -> None:
    """Show the answer to each prompt of the options, or to the text of `stdin`.

    On a terminal, answer one line of it after another, until it ends. Raises TokenyardError.
    """
    chat = Chat.load(options)
    if options.prompt is None and stdin.isatty():
        _converse(chat, show)
        return
    prompts = options.prompt or [stdin.read().removesuffix("\n")]
    for answer in chat.answer([chat.start(prompt) for prompt in prompts]):
        show(answer)


def _converse(chat: Chat, show: Callable[[str], None]) -> None:
    """Answer lines of the terminal. Earlier turns are kept."""
    messages: list[Message] | None = None
    for line in _typed_lines():
        messages = chat.start(line) if messages is None else [*messages, _message("user", line)]
        (answer,) = chat.answer([messages])
        show(answer)
        messages.append(_message("assistant", answer))


def _typed_lines() -> Iterator[str]:
    """Yield lines that are not empty, until Ctrl-D or Ctrl-C."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def required_template(loaded: LoadedModel, given: Path | None, model: Path) -> ChatTemplate:
    """Return a given chat template, or that of a model. Raises ConfigError if there is none."""
    path = loaded.chat_template if given is None else str(given)
    key = "--chat-template" if given else "train_loader.dataset.chat_template"
    template = read_template(path, loaded.tokenizer, key)
    if template is None:
        raise ConfigError(
            f"the tokenizer {loaded.tokenizer.name!r} of {model} has no chat template; put one "
            "beside it as chat_template.jinja, give generate a file by --chat-template, or leave "
            "--chat out"
        )
    return template


class Chat:
    """A model that answers conversations in a chat template."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        system: str | None = None,
    ):
        self._loaded = loaded
        self._tokenizer = tokenizer
        self._template = template
        self._sampling = sampling
        self._system = system
        spare = min(2 * sampling.max_new_tokens, _SPARE)
        self._decoder = Decoder(spare, shares_tokens=True)

    @classmethod
    def load(cls, options: GenerateOptions) -> Self:
        """Load the model and its template. Raises ConfigError if there is no template."""
        loaded = load_trained(options.model, options.device, options.precision, options.base)
        loaded = loaded.with_tokenizer(options.tokenizer)
        tokenizer = loaded.build_tokenizer()
        template = required_template(loaded, options.chat_template, options.model)
        stops = loaded.stop_ids()
        sampling = Sampling(
            options.max_new_tokens, options.temperature, options.seed, stops, warn_when_full=True
        )
        return cls(loaded, tokenizer, template, sampling, options.system)

    def start(self, text: str) -> list[Message]:
        """Return a conversation that starts with a user's text, and the system message if any."""
        system = [] if self._system is None else [_message("system", self._system)]
        return [*system, _message("user", text)]

    def answer(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return the next answer of each conversation, without spaces around it.

        Raises ConfigError for a message without text, for roles that the template refuses, and if
        a conversation fills the model.
        """
        prompts = [self._encode(messages) for messages in conversations]
        ends = self._end_of_turn(conversations[0])
        sampling = replace(self._sampling, stops={*self._sampling.stops, *ends})
        with self._loaded.autocast():
            texts = continue_ids(
                self._loaded.model, self._tokenizer, prompts, sampling, self._decoder
            )
        return [text.strip() for text in texts]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids after which the next answer begins. Segments are tokenized alone."""
        text = messages[-1]["content"]
        if not text.strip():
            raise ConfigError("the message is empty; give text by --prompt or standard input")
        warn_of_loss(self._tokenizer, [text], "--chat")
        segments = prompt_segments(self._template, messages, _LOCATION)
        parts = (self._tokenizer.encode(utf8(s.text)).tolist() for s in segments)
        ids = list(itertools.chain.from_iterable(parts)) or [self._tokenizer.end]
        model = self._loaded.model
        if len(ids) >= model.max_seq_len:
            raise ConfigError(
                f"{_LOCATION} has {len(ids)} tokens and the model's max_seq_len is "
                f"{model.max_seq_len}; start a new one, or shorten the message"
            )
        check_vocabulary(model, ids, _LOCATION)
        return ids

    def _end_of_turn(self, messages: Sequence[Message]) -> list[int]:
        """Return the special token that the template writes after an answer."""
        answered = [*messages, _message("assistant", _ANSWER)]
        _, answer, text = self._template.render(answered, _LOCATION).rpartition(_ANSWER)
        for i in self._tokenizer.encode(utf8(text)).tolist() if answer else ():
            if self._tokenizer.decode([i], special=True) and not self._tokenizer.decode([i]):
                return [i]
        log.warning(
            "the chat template ends an answer with no special token, so that answers end at "
            "the end of a document or after --max-new-tokens"
        )
        return []


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
