"""What counting alone achieves: unigram and bigram models, scored on exactly the targets that the model predicts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenyard_train.data import HeldOut, Samples, Tokenizer
from tokenyard_train.data.tokenizer import Ids


class Baselines(NamedTuple):
    """Bits per byte of held-out text."""

    unigram: float
    bigram: float


def ngram_baselines(train: Samples, held_out: HeldOut, tokenizer: Tokenizer) -> Baselines:
    """Fit both models on the whole training text and score the held-out one.

    The unigram adds one to every count. The bigram is interpolated with it by Witten and Bell's estimate (1991, IEEE
    Trans. Inf. Theory 37(4)): p(b | a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) counts the distinct tokens
    seen after a.
    """
    vocabulary = tokenizer.vocab_size
    counts = pair_counts(train.tokens, vocabulary)
    unigram = (np.bincount(train.tokens, minlength=vocabulary) + 1) / (len(train.tokens) + vocabulary)
    bigram = witten_bell(counts, unigram)
    previous, target = held_out.previous, held_out.predicted
    size = tokenizer.bytes_in(target)
    bits = (-np.log2(unigram[target]).sum(), -np.log2(bigram[previous, target]).sum())
    return Baselines(float(bits[0] / size), float(bits[1] / size))


def pair_counts(tokens: Ids, vocabulary: int) -> NDArray[np.int64]:
    """Return [V, V]: how often each token follows each."""
    pairs = tokens[:-1].astype(np.int64) * vocabulary + tokens[1:]
    return np.bincount(pairs, minlength=vocabulary**2).reshape(vocabulary, vocabulary)


def witten_bell(counts: NDArray[np.int64], unigram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [V, V]: the probability of each token after each; after one never seen, the unigram."""
    total, distinct = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
    weight = np.where(total > 0, total + distinct, 1)
    return np.where(total > 0, (counts + distinct * unigram) / weight, unigram)
