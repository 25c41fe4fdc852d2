"""Unigram and bigram models against a slow reading of their formulas."""

import math
from collections import Counter

import numpy as np
import pytest

from tokenyard_train.baselines import ngram_baselines, pair_counts, witten_bell
from tokenyard_train.data import BytesTokenizer, HeldOut, Samples

TOKENIZER = BytesTokenizer()
TRAIN = np.append(TOKENIZER.encode(b"the cat sat on the mat, the rat sat on the cat; " * 4), 256).astype(np.uint16)
TEXT = np.append(TOKENIZER.encode(b"the bat sat on the mat?"), 256).astype(np.uint16)


def test_bits_per_byte_read_token_by_token():
    train, held_out = Samples(TRAIN, 8, 0), HeldOut(TEXT, 8, 2)
    once, pairs = Counter(TRAIN.tolist()), Counter(zip(TRAIN.tolist(), TRAIN[1:].tolist()))
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
    assert got.unigram == pytest.approx(-sum(math.log2(unigram[b]) for _, b in steps) / size, rel=1e-12)
    assert got.bigram == pytest.approx(-sum(math.log2(bigram(a, b)) for a, b in steps) / size, rel=1e-12)
    assert got.bigram < got.unigram


def test_every_context_gives_a_distribution():
    unigram = (np.bincount(TRAIN, minlength=257) + 1) / (len(TRAIN) + 257)
    assert witten_bell(pair_counts(TRAIN, 257), unigram).sum(1) == pytest.approx(np.ones(257), rel=1e-12)
