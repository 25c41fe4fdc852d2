"""Turn a row of data into segments: prompts and answers.

| columns of a row | document |
|---|---|
| `messages` | a conversation, rendered by the chat template |
| `instruction`, perhaps `input`, and `output` | a conversation of one question and one answer |
| `prompt` and `response` (or `completion`) | both texts as they are, and the end of a document |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data.finetuning.left_out import LeftOut
from tokenyard_train.data.finetuning.segment import Segment
from tokenyard_train.data.finetuning.template import ChatTemplate, Message

_ANSWERS = ("response", "completion")
_CHOICES = ("weight", "train", "training")  # of an answer, in files of other trainers
_NEXT = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""The roles that may follow a role. None is the start."""


class Conversations:
    """Reads rows as segments. Without a template, conversations are refused.

    With `last_only`, the last answer alone is marked as one.
    """

    def __init__(self, template: ChatTemplate | None, last_only: bool):
        self.template = template
        self.last_only = last_only
        self.left_out = LeftOut()

    def segments(self, row: Any, location: str) -> list[Segment]:
        """Return the segments of a row. Raises ConfigError, one sentence that names `location`."""
        if not isinstance(row, Mapping):
            raise ConfigError(f"{location} is no object with columns; {_WANTED}")
        if "chosen" in row and "rejected" in row:
            raise ConfigError(
                f"{location} has chosen and rejected answers, and preferences are not trained on; "
                "write the chosen ones as messages"
            )
        if "messages" in row:
            self.left_out.add_columns(row, ("messages", "tools"))
            return self._chat(row["messages"], row, location)
        answer = next((name for name in _ANSWERS if name in row), None)
        if "prompt" in row and answer is not None:
            self.left_out.add_columns(row, ("prompt", answer))
            return self._prompt(row["prompt"], row[answer], answer, location)
        if "instruction" in row and "output" in row:
            self.left_out.add_columns(row, ("instruction", "input", "output", "tools"))
            return self._chat(_question(row, location), row, location)
        raise ConfigError(f"{location} has {', '.join(map(str, row)) or 'no columns'}; {_WANTED}")

    def _prompt(self, prompt: Any, answer: Any, name: str, location: str) -> list[Segment]:
        if isinstance(prompt, list) and isinstance(answer, list):
            return self._chat(prompt + answer, {}, location)
        _check_answer(answer, f"{location}: its {name}")
        question = Segment(_text(prompt, f"{location}: its prompt"), False)
        return [question, Segment(answer, True, ended=True)]

    def _chat(self, messages: Any, row: Mapping[str, Any], location: str) -> list[Segment]:
        checked = _checked(messages, location)
        template = self.template
        if template is None:
            raise ConfigError(
                f"{location} is a conversation, and the tokenizer has no chat template; give a "
                "file of one by dataset.chat_template, or a tokenizer's folder that has one"
            )
        tools = row.get("tools")
        if template.marks_answers:
            marked = template.marked(checked, location, tools=tools)
            whole = "".join(segment.text for segment in marked)
            self.left_out.add_messages(checked, tools, whole, location)
            answers = [i for i, segment in enumerate(marked) if segment.answer]
            if self.last_only:  # an answer may have several blocks
                before = template.marked(checked[:-1], location, prompt=True, tools=tools)
                answers = answers[sum(segment.answer for segment in before) :]
            return _with_answers(marked, answers, location)
        answers = [i for i, message in enumerate(checked) if message["role"] == "assistant"]
        text = template.render(checked, location, tools=tools)
        self.left_out.add_messages(checked, tools, text, location)
        if self.last_only:
            answers = answers[-1:]
        return _split(template, checked, answers, text, location, tools)


def _with_answers(
    segments: Sequence[Segment], answers: Sequence[int], location: str
) -> list[Segment]:
    """Return segments of which those of some indices alone are answers."""
    if not answers:
        raise ConfigError(f"{location}: no generation block of the chat template renders it")
    return [Segment(segment.text, i in answers) for i, segment in enumerate(segments)]


_WANTED = "a row has messages, prompt and response, or instruction and output"


def prompt_segments(
    template: ChatTemplate, messages: Sequence[Message], location: str
) -> list[Segment]:
    """Return the text after which the next answer begins, in the segments of training.

    It is one segment if the template renders an earlier answer in another way than a last one.
    Raises ConfigError, naming the `location` of the messages, if the template refuses them.
    """
    if template.marks_answers:
        return template.marked(messages, location, prompt=True)
    text = template.render(messages, location, prompt=True)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        return _split(template, messages, answers, text, location)
    except ConfigError:
        return [Segment(text, False)]


def _split(
    template: ChatTemplate,
    messages: Sequence[Message],
    answers: Sequence[int],
    text: str,
    location: str,
    tools: Any = None,
) -> list[Segment]:
    """Split the text of messages at the answers of some indices.

    An answer is what follows the generation prompt.
    """
    segments = []
    done = 0
    for i in answers:
        before = template.render(messages[:i], location, prompt=True, tools=tools)
        after = template.render(messages[: i + 1], location, tools=tools)
        _check_prefixes(before, after, text, location)
        segments.append(Segment(text[done : len(before)], False))
        segments.append(Segment(text[len(before) : len(after)], True))
        done = len(after)
    return [*segments, Segment(text[done:], False)]


def _check_prefixes(before: str, after: str, text: str, location: str) -> None:
    """Raise ConfigError unless a text begins with what precedes an answer and what includes it."""
    if not (after.startswith(before) and text.startswith(after)):
        raise ConfigError(
            f"{location}: the chat template renders an answer in another way when messages follow, "
            "so its tokens are unknown; say dataset.target_responses: last, or mark answers in the "
            "template by {% generation %}"
        )


def _question(row: Mapping[str, Any], location: str) -> list[Message]:
    question = _text(row["instruction"], f"{location}: its instruction")
    if row.get("input") not in (None, ""):
        question += "\n\n" + _text(row["input"], f"{location}: its instruction's input")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _checked(messages: Any, location: str) -> list[Message]:
    """Return messages without their null values. Raises ConfigError for roles out of order."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{location}: messages is no list of messages; {_WANTED}")
    checked: list[Message] = []
    role = None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"{location}: message {number} has no role; give role and content")
        allowed = _NEXT[role]
        role = message["role"]
        if role not in allowed:
            raise ConfigError(
                f"{location}: message {number} is from {role!r} where {' or '.join(allowed)} must "
                "follow; mend the row, or leave it out"
            )
        where = f"{location}: message {number}, from {role!r},"
        for name in _CHOICES:
            if message.get(name) not in (None, 1):
                raise ConfigError(
                    f"{where} has the {name} {message[name]!r}, which is not read: answers are "
                    f"chosen by dataset.target_responses; leave {name} out"
                )
        if not message.get("tool_calls"):
            (_check_answer if role == "assistant" else _text)(message.get("content"), where)
        checked.append({name: value for name, value in message.items() if value is not None})
    if role != "assistant":
        raise ConfigError(
            f"{location}: the last message is from {role!r}; it must be from 'assistant', which is "
            "what is trained on"
        )
    return checked


def _check_answer(value: Any, where: str) -> None:
    if not _text(value, where).strip():
        raise ConfigError(f"{where} is empty; leave the row out")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ConfigError(f"{where} is {kind}, not text; mend the row")
    return value
