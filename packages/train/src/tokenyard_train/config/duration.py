"""Parse durations in LLM Foundry's notation.

`200ba` is batches, `1ep` epochs, `10000tok` tokens, and `0.1dur` a share of the run.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(ba|ep|tok|dur)\s*$")

_MOST = 1e15  # of any unit: its float is exact


class Span(NamedTuple):
    """A length of training in batches (ba), epochs (ep), tokens (tok) or as a share (dur)."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"

    def batches(self, batch_tokens: int, epoch_batches: int, run_batches: int | None = None) -> int:
        """Return the span in whole optimizer steps.

        Tokens are rounded up, epochs and shares down. Raises ValueError for a share of the run
        without `run_batches`.
        """
        match self.unit:
            case "ba":
                return int(self.value)
            case "ep":
                return int(self.value * epoch_batches)
            case "tok":
                return -int(-self.value // batch_tokens)
            case _:
                if run_batches is None:
                    raise ValueError(
                        "'dur' is a share of the run's length; "
                        "max_duration itself takes ba, ep or tok"
                    )
                return int(self.value * run_batches)


def parse_span(value: Any) -> Span:
    """Parse a duration such as `200ba`. Raises ValueError that shows the format."""
    if isinstance(value, Span):
        return value
    match = _PATTERN.match(str(value))
    if match is None:
        raise ValueError(
            "a duration is a number with ba (batches), ep (epochs), tok (tokens) or dur, "
            "such as 200ba"
        )
    span = Span(float(match[1]), match[2])
    if span.value > _MOST:
        raise ValueError(f"a duration is at most {_MOST:g}; give a shorter one")
    if span.unit == "ba" and not span.value.is_integer():
        raise ValueError("ba counts whole batches; give a whole number, or a share by dur")
    return span


Duration = Annotated[Span, BeforeValidator(parse_span), PlainSerializer(str)]
