"""Chat templates of tokenizers: Jinja, rendered in a sandbox as transformers renders them."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenyard import ConfigError
from tokenyard.bounded import read_text
from tokenyard_train.data.finetuning.segment import Segment
from tokenyard_train.data.hf_tokenizer import read_options, tokenizer_file
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.optional import require

Message = dict[str, Any]

# Unicode noncharacters. They mark what a generation block renders, so messages may not hold them.
_BEGIN = "\ufdd0"
_END = "\ufdd1"

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_DATE = datetime.datetime(2024, 7, 26)  # as Llama's templates: a resumed run reads the same text
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplate:
    """Renders messages as text.

    `variables` are names that the template may use, such as bos_token. Raises ConfigError for a
    template that is not Jinja; `location` names it.
    """

    def __init__(self, source: str, variables: dict[str, str], location: str):
        self._variables = variables
        self.marks_answers = _GENERATION.search(source) is not None
        environment = _environment(location)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # jinja2 raises errors of many types
            raise ConfigError(
                f"{location} is not a chat template: {' '.join(str(error).split())[:200]}"
            ) from None

    def render(
        self, messages: Sequence[Message], location: str, prompt: bool = False, tools: Any = None
    ) -> str:
        """Return the text of messages. With `prompt`, the next answer would begin at its end.

        Raises ConfigError, naming the `location` of the messages, if the template refuses them.
        """
        text = self._render(messages, location, prompt, tools)
        return text.replace(_BEGIN, "").replace(_END, "") if self.marks_answers else text

    def marked(
        self, messages: Sequence[Message], location: str, prompt: bool = False, tools: Any = None
    ) -> list[Segment]:
        """Return the text in segments; what generation blocks render is an answer."""
        text = self._render(messages, location, prompt, tools)
        segments = []
        for part in re.split(f"({_BEGIN}[^{_END}]*{_END})", text):
            answer = part.startswith(_BEGIN)
            if part:
                segments.append(Segment(part.strip(_BEGIN + _END), answer))
        return segments

    def _render(self, messages: Sequence[Message], location: str, prompt: bool, tools: Any) -> str:
        given = str((messages, tools))
        if self.marks_answers and (repr(_BEGIN)[1:-1] in given or repr(_END)[1:-1] in given):
            raise ConfigError(
                f"{location} holds the noncharacter U+FDD0 or U+FDD1, which marks answers here; "
                "remove it"
            )
        try:
            return str(
                self._template.render(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    **self._variables,
                )
            )
        except Exception as error:  # of jinja2, and of what the template calls
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{location}: the chat template refuses it: {reason}") from None


def read_template(path: str | None, tokenizer: TokenizerConfig, key: str) -> ChatTemplate | None:
    """Return the chat template of a file, or that of a tokenizer; None if there is neither.

    `key` is the config key or the option that gives the path, for errors. Raises ConfigError.
    """
    config = _tokenizer_config(tokenizer)
    variables = {name: text for name in _TOKENS if (text := _token(config.get(name))) is not None}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"{key} is {path!r}, which is no file; give one of a Jinja template")
        return ChatTemplate(read_text(path), variables, f"{key} {path!r}")
    folder = _folder(tokenizer)
    file = None if folder is None else folder / "chat_template.jinja"
    if file is not None and file.is_file():
        return ChatTemplate(read_text(file), variables, str(file))
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        listed = [each for each in source if isinstance(each, dict)]
        named = {each.get("name"): each.get("template") for each in listed}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, variables, f"the chat_template of tokenizer {tokenizer.name!r}")


def _folder(tokenizer: TokenizerConfig) -> Path | None:
    if tokenizer.name in ("bytes", "tiktoken"):
        return None
    return tokenizer_file(Path(tokenizer.name)).parent


def _tokenizer_config(tokenizer: TokenizerConfig) -> dict[str, Any]:
    folder = _folder(tokenizer)
    return {} if folder is None else read_options(folder / "tokenizer.json")


def _token(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _environment(location: str) -> Any:
    """Return transformers' environment: its filters and functions, and no access to Python."""
    sandbox = require("jinja2.sandbox", location, "tokenyard-train[data]")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_extension(), "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _DATE.strftime
    return environment


def _generation_extension() -> Any:
    """Return the extension for generation blocks. It marks what they render."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = nodes.CallBlock(self.call_method("_mark"), [], [], body)
            return call.set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    return Generation


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
