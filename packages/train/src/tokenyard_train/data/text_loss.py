"""Count documents whose ids do not represent their text."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from tokenyard_train.data.tokenizer import BytesTokenizer, Tokenizer
from tokenyard_train.data.tokens import Ids

log = logging.getLogger("tokenyard")


@dataclass
class TextLoss:
    """Counts of documents whose ids do not represent their text."""

    ended: int = 0  # documents whose text holds the end-of-document token
    lossy: int = 0  # documents with characters that the tokenizer drops or changes
    characters: set[str] = field(default_factory=set)  # those characters

    def add(self, other: TextLoss) -> None:
        """Add the counts of other documents."""
        self.ended += other.ended
        self.lossy += other.lossy
        self.characters |= other.characters

    def warn(self, location: str) -> None:
        """Log a warning for each kind of loss. `location` names the documents."""
        if self.ended:
            log.warning(
                "%s: %d documents contain the text of the end-of-document token, which becomes "
                "its id, as in transformers; split_special_tokens in tokenizer_config.json "
                "makes it plain text",
                location,
                self.ended,
            )
        if self.lossy:
            examples = " ".join(map(ascii, sorted(self.characters)[:5]))
            log.warning(
                "%s: %d documents contain characters that the tokenizer drops or changes "
                "(%d different ones, such as %s), so bits_per_byte is wrong for them; "
                "give a tokenizer that has them",
                location,
                self.lossy,
                len(self.characters),
                examples,
            )


class LossCounter:
    """Encodes documents, and counts those whose ids do not represent their text.

    Each character but spaces is decoded once, so the cost per document is that of its set of
    characters.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.loss = TextLoss()
        self._lossless = isinstance(tokenizer, BytesTokenizer)
        self._kept: set[str] = set()
        self._lost: set[str] = set()

    def encode(self, document: bytes) -> Ids:
        """Return the ids of a document, without its end id."""
        ids = self.tokenizer.encode(document)
        if not self._lossless:
            self.loss.ended += bool((ids == self.tokenizer.end).any())
            lost = self._lost_characters(document)
            self.loss.lossy += bool(lost)
            self.loss.characters |= lost
        return ids

    def take(self) -> TextLoss:
        """Return the counts, and start anew."""
        loss = self.loss
        self.loss = TextLoss()
        return loss

    def _lost_characters(self, document: bytes) -> set[str]:
        characters = set(document.decode("utf-8"))
        for character in characters - self._kept - self._lost:
            self._known(character).add(character)
        return characters & self._lost

    def _known(self, character: str) -> set[str]:
        """Return the set that a new character belongs to."""
        # At the start of a word and inside one: a vocabulary may have it in one place only.
        ids = self.tokenizer.encode(f"{character} a{character}".encode())
        kept = character.isspace() or character in self.tokenizer.decode(ids.tolist())
        return self._kept if kept else self._lost
