"""The cache of a conversation, kept from one answer to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from tokenyard import Model


class KeptCache:
    """Tokens that a prompt shares with the sequence before are not computed again.

    This needs a model whose caches have ``prefix(length, capacity)``.
    """

    def __init__(self) -> None:
        self._cache: Any = None
        self._ids: Sequence[int] = ()  # whose keys and values are in the cache

    def open(self, model: Model, prompt: Sequence[int], length: int) -> tuple[Any, int]:
        """Return a cache for `length` tokens, and how many ids of the prompt it holds, not all."""
        pairs = zip(self._ids, prompt[:-1])
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared and hasattr(self._cache, "prefix"):
            return self._cache.prefix(shared, length), shared
        return model.new_cache(1, length), 0

    def keep(self, cache: Any, ids: Sequence[int]) -> None:
        """Keep a cache that holds these ids."""
        self._cache = cache
        self._ids = ids
