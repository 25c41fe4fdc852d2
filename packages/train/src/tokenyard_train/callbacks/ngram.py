"""Score unigram and bigram models on exactly the targets that the trained model predicts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenyard import ConfigError, Model
from tokenyard_train.config.schema import TrainConfig
from tokenyard_train.data import (
    Data,
    HeldOut,
    Mixture,
    PackedDocuments,
    PackedHeldOut,
    Samples,
    Tokenizer,
)
from tokenyard_train.data.tokens import Ids
from tokenyard_train.engine.callback import Callback
from tokenyard_train.engine.state import Run

_MAX_TOKENS = 1 << 28  # tokens are counted in memory


class Baselines(NamedTuple):
    """Scores of the n-gram models in bits per byte of held-out text."""

    unigram: float
    bigram: float


class PairCounts(NamedTuple):
    """Counts of adjacent token pairs. Pairs that do not occur are not stored."""

    pairs: NDArray[np.int64]  # [P] first * vocabulary + second, ascending
    counts: NDArray[np.int64]  # [P]
    vocabulary: int

    def lookup(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.int64]:
        """Return the count of each pair (first[i], second[i]) [N]."""
        wanted = first.astype(np.int64) * self.vocabulary + second
        rows = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return np.where(self.pairs[rows] == wanted, self.counts[rows], 0)

    def followers(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each token [V] the number of tokens after it, in total and distinct."""
        firsts = self.pairs // self.vocabulary
        total = np.zeros(self.vocabulary, dtype=np.int64)
        np.add.at(total, firsts, self.counts)
        return total, np.bincount(firsts, minlength=self.vocabulary)


def ngram_baselines(
    train: Samples | Mixture | PackedDocuments,
    held_out: HeldOut | PackedHeldOut,
    tokenizer: Tokenizer,
) -> Baselines:
    """Fit both models on the whole training text and score them on the held-out text.

    The unigram model adds one to every count. The bigram model is interpolated with it by the
    estimate of Witten and Bell (1991, IEEE Trans. Inf. Theory 37(4)):
    p(b | a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) is the number of distinct tokens
    after a. Raises ConfigError for a mixture, and for more text than fits in memory.
    """
    tokens = np.asarray(_one_text(train).tokens[:])
    vocabulary = tokenizer.vocab_size
    target = held_out.predicted
    unigram = (np.bincount(tokens, minlength=vocabulary) + 1) / (len(tokens) + vocabulary)
    bigram = witten_bell(pair_counts(tokens, vocabulary), unigram, held_out.previous, target)
    size = tokenizer.bytes_in(target)
    return Baselines(
        unigram=float(-np.log2(unigram[target]).sum() / size),
        bigram=float(-np.log2(bigram).sum() / size),
    )


def _one_text(train: Samples | Mixture | PackedDocuments) -> Samples:
    if isinstance(train, PackedDocuments):
        raise ConfigError(
            "callbacks.ngram_baselines counts one text, not conversations; leave it out"
        )
    if isinstance(train, Mixture) or len(train.tokens) > _MAX_TOKENS:
        what = "several streams" if isinstance(train, Mixture) else f"{len(train.tokens):,} tokens"
        raise ConfigError(
            f"callbacks.ngram_baselines counts one text of up to {_MAX_TOKENS:,} tokens, not {what}"
        )
    return train


def pair_counts(tokens: Ids, vocabulary: int) -> PairCounts:
    """Count adjacent token pairs."""
    pairs, counts = np.unique(
        tokens[:-1].astype(np.int64) * vocabulary + tokens[1:], return_counts=True
    )
    return PairCounts(pairs, counts, vocabulary)


def witten_bell(
    counts: PairCounts, unigram: NDArray[np.float64], previous: NDArray[Any], target: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the bigram probability of each target after its previous token [N].

    `unigram` holds the unigram probability of each token [V]. It is the result after a token that
    the training text does not continue.
    """
    total, distinct = (per_token[previous] for per_token in counts.followers())
    weight = np.where(total > 0, total + distinct, 1)
    interpolated = (counts.lookup(previous, target) + distinct * unigram[target]) / weight
    return np.where(total > 0, interpolated, unigram[target])


class NgramScorer(Callback):
    """Writes the n-gram models' scores on the held-out text to metrics.jsonl."""

    def check(self, config: TrainConfig, model: Model, data: Data) -> None:
        """Raise ConfigError for anything but one text, and for more than fits in memory."""
        if data.held_out is not None:
            _one_text(data.train)

    def start(self, run: Run) -> None:
        """Fit, score and record both models."""
        data = run.setup.data
        if data.held_out is not None:
            scores = ngram_baselines(data.train, data.held_out, data.tokenizer)
            run.metrics.write({"kind": "baselines", **scores._asdict()})
