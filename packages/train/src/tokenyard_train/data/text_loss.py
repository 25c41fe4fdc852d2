"""Count documents whose ids do not represent their text."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from tokenyard_train.data.tokenizer import BytesTokenizer, Tokenizer
from tokenyard_train.data.tokens import Ids

log = logging.getLogger("tokenyard")

_COMPARED = 16  # one document in so many is decoded
_COMPARED_IDS = 1 << 16
_REPLACEMENT = "\ufffd"


@dataclass
class TextLoss:
    """Counts of documents whose ids do not represent their text."""

    ended: int = 0  # documents whose text holds the end-of-document token
    lossy: int = 0  # documents with characters that the tokenizer drops or changes
    characters: set[str] = field(default_factory=set)  # those characters
    compared: int = 0  # documents that were compared with the text of their ids
    changed: int = 0  # compared documents with another text, of characters that are known
    example: str = ""  # where the first of them differs

    def add(self, other: TextLoss) -> None:
        """Add the counts of other documents."""
        self.ended += other.ended
        self.lossy += other.lossy
        self.characters |= other.characters
        self.compared += other.compared
        self.changed += other.changed
        self.example = self.example or other.example

    def warn(self, location: str, documents: str = "documents") -> None:
        """Log a warning for each kind of loss. `location` names the documents."""
        if self.ended:
            log.warning(
                "%s: %d %s contain the text of the end-of-document token, which becomes "
                "its id, as in transformers; split_special_tokens in tokenizer_config.json "
                "makes it plain text",
                location,
                self.ended,
                documents,
            )
        if self.lossy:
            examples = " ".join(map(ascii, sorted(self.characters)[:5]))
            log.warning(
                "%s: %d %s contain characters that the tokenizer drops or changes "
                "(%d different ones, such as %s), so bits_per_byte is wrong for them; "
                "give a tokenizer that has them",
                location,
                self.lossy,
                documents,
                len(self.characters),
                examples,
            )
        if self.changed:
            log.warning(
                "%s: %d of %d compared %s differ from the text of their ids (%s): the "
                "tokenizer drops or changes something, such as spaces, so bits_per_byte is wrong "
                "for them; give a tokenizer that keeps all text",
                location,
                self.changed,
                self.compared,
                documents,
                self.example,
            )


class LossCounter:
    """Encodes documents, and counts those whose ids do not represent their text.

    Each character but spaces is decoded once, so the cost per document is that of its set of
    characters. One document in _COMPARED, the first one included, is decoded and compared whole:
    its first _COMPARED_IDS ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.loss = TextLoss()
        self._lossless = isinstance(tokenizer, BytesTokenizer)
        self._kept: set[str] = set()
        self._lost: set[str] = set()
        self._documents = 0

    def encode(self, document: bytes) -> Ids:
        """Return the ids of a document, without its end id."""
        ids = self.tokenizer.encode(document)
        if not self._lossless:
            self.loss.ended += bool((ids == self.tokenizer.end).any())
            lost = self._lost_characters(document)
            self.loss.lossy += bool(lost)
            self.loss.characters |= lost
            if not lost and self._documents % _COMPARED == 0:
                self._compare(document, ids)
            self._documents += 1
        return ids

    def take(self) -> TextLoss:
        """Return the counts, and start anew."""
        loss = self.loss
        self.loss = TextLoss()
        return loss

    def _compare(self, document: bytes, ids: Ids) -> None:
        """Count a document whose ids have another text."""
        text = document.decode("utf-8")
        kept = self.tokenizer.decode(ids[:_COMPARED_IDS].tolist(), special=True)
        if len(ids) > _COMPARED_IDS:  # the last character may be cut
            kept = kept.rstrip(_REPLACEMENT)
            text = text[: len(kept)]
        self.loss.compared += 1
        if kept != text:
            self.loss.changed += 1
            pairs = enumerate(zip(text, kept))
            first = next((i for i, (a, b) in pairs if a != b), min(len(text), len(kept)))
            span = slice(max(0, first - 8), first + 8)
            self.loss.example = self.loss.example or f"{text[span]!a} became {kept[span]!a}"

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
