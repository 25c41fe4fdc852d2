"""Express bytes and tiktoken encodings as the tokenizer.json of a byte-level BPE."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenyard import ConfigError
from tokenyard_train.data import BytesTokenizer
from tokenyard_train.data.tiktoken_tokenizer import TiktokenTokenizer
from tokenyard_train.optional import require

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}

_POSSESSIVE = re.compile(r"(\\[pP]\{[^}]*\}|\\.|\[[^\]]*\]|[^\\()|])(\{\d+(?:,\d*)?\})\+")
"""Counts such as ``\\p{N}{1,3}+``. To the `tokenizers` library the plus repeats them."""

_SAMPLE = """The quick brown fox's 12 3456789 they'LL we'd  don't\tdo\r\n\r\n  it.   \n
Größe ÆØÅ été naïve señor Ελληνικά Кириллица עברית العربية हिन्दी ไทย 日本語の文章 中文 한국어
def f(x): return x**2 != 0x1F  # http://a.b/c?d=e&f#g "quoted" (a+b)*[c]{d}|e\\n
👩‍👩‍👧 🇫🇷 _under_score camelCase e\u0301 \u00a0\u2003\u200b\u0000\x7f\ufeff.
½ ² Ⅷ ٣٤٥ <|a|\u3000 end   """
"""Text on which a tokenizer.json is compared with the encoding that it expresses."""


def bytes_tokenizer(end: str) -> dict[str, Any]:
    """Return a tokenizer.json that maps each byte to its value, and `end` to 256."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return _tokenizer(model, _BYTE_LEVEL, {end: BytesTokenizer.end})


def tiktoken_tokenizer(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """Return a tokenizer.json with the ids of a tiktoken encoding.

    Raises ConfigError if its ids differ on sample text, as where a pattern means something else to
    the `tokenizers` library.
    """
    tokenizers = require("tokenizers", "a tokenizer.json of tiktoken", "tokenyard-train[data]")
    characters = _byte_characters()
    ranks = tokenizer.ranks
    vocabulary = {"".join(characters[byte] for byte in token): i for token, i in ranks.items()}
    merges = [["".join(characters[byte] for byte in part) for part in m] for m in _merges(ranks)]
    # The model holds special tokens too: an added token that it lacks gets the next free id.
    model = {
        "type": "BPE",
        "vocab": vocabulary | tokenizer.special_tokens,
        "merges": merges,
        "ignore_merges": True,
    }
    # Only what the pattern matches is text, as in tiktoken.
    split = {
        "type": "Split",
        "pattern": {"Regex": _POSSESSIVE.sub(r"(?>\1\2)", tokenizer.pattern)},
        "behavior": "Removed",
        "invert": True,
    }
    steps = {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}
    content = _tokenizer(model, steps, tokenizer.special_tokens)
    try:
        same = _same_ids(tokenizers.Tokenizer.from_str(json.dumps(content)), tokenizer)
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(
            f"no tokenizer.json can express this tiktoken encoding: {error}"
        ) from None
    if not same:
        raise ConfigError(
            "no tokenizer.json can express this tiktoken encoding: its ids of sample text differ "
            f"with the pattern {tokenizer.pattern!r}"
        )
    return content


def _same_ids(written: Any, tokenizer: TiktokenTokenizer) -> bool:
    """Return whether both encode sample text equally, special tokens in it as plain text."""
    written.encode_special_tokens = True
    sample = _SAMPLE + " ".join(tokenizer.special_tokens)
    return bool(written.encode(sample).ids == tokenizer.encode(sample.encode()).tolist())


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return each pair of tokens whose bytes together are a token, by the rank of that token."""
    pairs = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left = ranks.get(token[:cut])
            right = ranks.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((rank, left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(pairs)]


def _tokenizer(
    model: dict[str, Any], pre_tokenizer: dict[str, Any], special: dict[str, int]
) -> dict[str, Any]:
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, i in sorted(special.items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in GPT-2's byte-level tokenizers.

    Printable Latin-1 characters stand for themselves, the other bytes for characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    characters = []
    for byte in range(256):
        others = byte - sum(1 for one in printable if one < byte)
        characters.append(chr(byte if byte in printable else 256 + others))
    return characters
