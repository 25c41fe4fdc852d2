"""Caches and CUDA graphs that are kept from one text to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from tokenyard import Model
from tokenyard_train.engine.decoding import DecodingStep

_KEPT = 2  # numbers of prompts, such as a batch and what is left of its texts

# Each new token reads the whole memory of a graph's cache. So a cache serves texts from this share
# of its tokens on, and a cache of so many tokens serves all.
_SHORTEST = 0.25
_SMALL = 4096


class _Kept(NamedTuple):
    """A step whose cache and graph are kept."""

    step: DecodingStep
    ids: Sequence[int]  # whose keys and values are in the cache, of the first row
    versions: list[int]  # of the weights and buffers that they were computed with


class Decoder:
    """Generates one text after another in the same memory, by the same CUDA graph.

    Give it to each `sample` of a model. A cache with its graph is kept for each of the last 2
    numbers of prompts. The next text of as many prompts takes them, if the cache has room for it,
    but not for more than 4,096 tokens and four times the text. This needs a model whose caches have
    ``rewind(length)``. The result is that of a new graph. A cache and its graph are freed before
    the next text if weights were replaced or moved, if settings of adapters changed, or if another
    model, autocast, inference mode or precision of float32 matmuls is used; and with this object.
    Under an autocast that keeps copies of weights, as with ``amp_bf16``, each text has a new graph,
    because the copies end with it.

    `spare` is the number of further tokens that a new cache has room for, up to the model's
    max_seq_len: a text that is longer than all before needs a new cache. With `shares_tokens`,
    tokens that a single prompt shares with the text before are not computed again, unless a weight
    or buffer changed. A change through ``weight.data`` is not seen: take a new decoder after it.
    """

    def __init__(self, spare: int = 0, shares_tokens: bool = False):
        self._spare = spare
        self._shares_tokens = shares_tokens
        self._kept: dict[int, _Kept] = {}  # by number of prompts; the one used last is last

    def start(
        self, model: Model, prompts: Sequence[Sequence[int]], length: int
    ) -> tuple[DecodingStep, int]:
        """Return a step for texts of `length` tokens, and how many ids its cache holds, not all.

        Nothing is kept of it before `keep`: a text that fails leaves nothing.
        """
        self._kept = {n: kept for n, kept in self._kept.items() if kept.step.serves(model)}
        kept = self._kept.pop(len(prompts), None)
        while len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        if kept is None:
            return self._new_step(model, len(prompts), length), 0
        step = kept.step
        shared = self._shared(kept, model, prompts)
        if _suits(step.capacity, length) and hasattr(step.cache, "rewind"):
            step.cache.rewind(shared)
            return step, shared
        if shared and hasattr(step.cache, "prefix"):
            capacity = self._capacity(model, length)
            return DecodingStep(model, step.cache.prefix(shared, capacity), capacity), shared
        return self._new_step(model, len(prompts), length), 0

    def keep(self, step: DecodingStep, model: Model, rows: int, ids: Sequence[int]) -> None:
        """Keep a step for as many rows. `ids` are those in the cache of the first."""
        shares = self._shares_tokens and hasattr(step.cache, "prefix")
        if shares or hasattr(step.cache, "rewind"):
            self._kept[rows] = _Kept(step, ids, _versions(model))

    def _shared(self, kept: _Kept, model: Model, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many ids a single prompt shares with the text before, not all of its own."""
        if not self._shares_tokens or len(prompts) > 1 or kept.versions != _versions(model):
            return 0
        pairs = zip(kept.ids, prompts[0][:-1])
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _new_step(self, model: Model, rows: int, length: int) -> DecodingStep:
        capacity = self._capacity(model, length)
        return DecodingStep(model, model.new_cache(rows, capacity), capacity)

    def _capacity(self, model: Model, length: int) -> int:
        return max(length, min(length + self._spare, model.max_seq_len))


def _suits(capacity: int, length: int) -> bool:
    """Return whether a cache has room for a text, and not far too much."""
    return length <= capacity <= max(_SMALL, length / _SHORTEST)


def _versions(model: Model) -> list[int]:
    """Return the version of each weight and buffer, which counts its changes in place."""
    tensors = (*model.parameters(), *model.buffers())
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
