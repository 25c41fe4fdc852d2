"""Unigram and bigram models against a slow reference of their formulas."""

import math
from collections import Counter

import numpy as np
import pytest

from tokenyard import ConfigError
from tokenyard_train.callbacks.ngram import ngram_baselines, pair_counts, witten_bell
from tokenyard_train.data import BytesTokenizer, HeldOut, Mixture, Samples

TOKENIZER = BytesTokenizer()
TRAIN = np.append(
    TOKENIZER.encode(b"the cat sat on the mat, the rat sat on the cat; " * 4), 256
).astype(np.uint16)
TEXT = np.append(TOKENIZER.encode(b"the bat sat on the mat?"), 256).astype(np.uint16)


def test_bits_per_byte_equal_the_reference():
    train = Samples(TRAIN, 8, 0)
    held_out = HeldOut(TEXT, 8, 2)
    once = Counter(TRAIN.tolist())
    pairs = Counter(zip(TRAIN.tolist(), TRAIN[1:].tolist()))
    unigram = {b: (once[b] + 1) / (len(TRAIN) + 257) for b in range(257)}
    followers = {a: {b for x, b in pairs if x == a} for a in range(257)}
    total = Counter(TRAIN[:-1].tolist())

    def bigram(a: int, b: int) -> float:
        if not total[a]:
            return unigram[b]
        return (pairs[a, b] + len(followers[a]) * unigram[b]) / (total[a] + len(followers[a]))

    steps = list(zip(TEXT.tolist(), TEXT[1:].tolist()))
    size = sum(b < 256 for _, b in steps)
    got = ngram_baselines(train, held_out, TOKENIZER)
    assert got.unigram == pytest.approx(
        -sum(math.log2(unigram[b]) for _, b in steps) / size, rel=1e-12
    )
    assert got.bigram == pytest.approx(
        -sum(math.log2(bigram(a, b)) for a, b in steps) / size, rel=1e-12
    )
    assert got.bigram < got.unigram


def test_every_context_gives_a_distribution():
    unigram = (np.bincount(TRAIN, minlength=257) + 1) / (len(TRAIN) + 257)
    first, second = (
        grid.flatten() for grid in np.meshgrid(np.arange(257), np.arange(257), indexing="ij")
    )
    probability = witten_bell(pair_counts(TRAIN, 257), unigram, first, second).reshape(257, 257)
    assert probability.sum(1) == pytest.approx(np.ones(257), rel=1e-12)


def test_a_large_vocabulary_needs_no_table_of_all_pairs():
    """A table of 200,000^2 counts would take 320 GB, so only pairs that occur are kept."""
    counts = pair_counts(np.array([7, 199_999, 7, 199_999, 3], dtype=np.uint32), 200_000)
    first = np.array([7, 199_999, 199_999, 5])
    second = np.array([199_999, 7, 3, 5])
    assert counts.lookup(first, second).tolist() == [2, 1, 1, 0]


def test_several_streams_are_not_counted():
    mixture = Mixture(
        {"a": Samples(TRAIN, 8, 0), "b": Samples(TEXT, 8, 0)}, {"a": 1, "b": 1}, seed=0
    )
    with pytest.raises(
        ConfigError, match=r"callbacks.ngram_baselines counts one text .* not several streams"
    ):
        ngram_baselines(mixture, HeldOut(TEXT, 8, 2), TOKENIZER)
