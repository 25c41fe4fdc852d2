"""What counting alone achieves: unigram and bigram models, scored on exactly the targets that the model predicts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenyard import ConfigError
from tokenyard_train.data import HeldOut, Mixture, Samples, Tokenizer
from tokenyard_train.data.tokens import Ids
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.state import Run

_MOST_TOKENS = 1 << 28  # counted in memory


class Baselines(NamedTuple):
    """Bits per byte of held-out text."""

    unigram: float
    bigram: float


class PairCounts(NamedTuple):
    """How often each token follows each, where it does at all."""

    pairs: NDArray[np.int64]  # ascending: first * vocabulary + second
    counts: NDArray[np.int64]
    vocabulary: int

    def of(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.int64]:
        """Return how often each second token followed its first."""
        asked = first.astype(np.int64) * self.vocabulary + second
        places = np.minimum(np.searchsorted(self.pairs, asked), len(self.pairs) - 1)
        return np.where(self.pairs[places] == asked, self.counts[places], 0)

    def after(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each token [V], how many tokens followed it, and how many distinct ones."""
        firsts = self.pairs // self.vocabulary
        total = np.zeros(self.vocabulary, dtype=np.int64)
        np.add.at(total, firsts, self.counts)
        return total, np.bincount(firsts, minlength=self.vocabulary)


def ngram_baselines(train: Samples | Mixture, held_out: HeldOut, tokenizer: Tokenizer) -> Baselines:
    """Fit both models on the whole training text and score the held-out one.

    The unigram adds one to every count. The bigram is interpolated with it by Witten and Bell's estimate (1991, IEEE
    Trans. Inf. Theory 37(4)): p(b | a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) counts the distinct tokens
    seen after a. Raises ConfigError for a mixture, and for more text than fits in memory.
    """
    if isinstance(train, Mixture) or len(train.tokens) > _MOST_TOKENS:
        what = "several streams" if isinstance(train, Mixture) else f"{len(train.tokens):,} tokens"
        raise ConfigError(
            f"callbacks.ngram_baselines counts one text of up to {_MOST_TOKENS:,} tokens, not {what}"
        )
    tokens, vocabulary = np.asarray(train.tokens[:]), tokenizer.vocab_size
    unigram = (np.bincount(tokens, minlength=vocabulary) + 1) / (len(tokens) + vocabulary)
    previous, target = held_out.previous, held_out.predicted
    bigram = witten_bell(pair_counts(tokens, vocabulary), unigram, previous, target)
    size = tokenizer.bytes_in(target)
    bits = (-np.log2(unigram[target]).sum(), -np.log2(bigram).sum())
    return Baselines(float(bits[0] / size), float(bits[1] / size))


def pair_counts(tokens: Ids, vocabulary: int) -> PairCounts:
    """Count which token follows which."""
    pairs, counts = np.unique(
        tokens[:-1].astype(np.int64) * vocabulary + tokens[1:], return_counts=True
    )
    return PairCounts(pairs, counts, vocabulary)


def witten_bell(
    counts: PairCounts, unigram: NDArray[np.float64], previous: NDArray[Any], target: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the probability of each target after its previous token; after one never seen, the unigram's."""
    total, distinct = (of_first[previous] for of_first in counts.after())
    weight = np.where(total > 0, total + distinct, 1)
    interpolated = (counts.of(previous, target) + distinct * unigram[target]) / weight
    return np.where(total > 0, interpolated, unigram[target])


class Baseline(Callback):
    """Scores the held-out text by counting, into metrics.jsonl."""

    def start(self, run: Run) -> None:
        """Fit, score and record."""
        data = run.setup.data
        if data.held_out is not None:
            scores = ngram_baselines(data.train, data.held_out, data.tokenizer)
            run.metrics.write({"kind": "baselines", **scores._asdict()})
