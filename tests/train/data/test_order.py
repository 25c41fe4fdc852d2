"""The global order of samples: computed shuffles, weighted mixtures, any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenyard import ConfigError
from tokenyard_train.data import Mixture, Samples, build_data
from tokenyard_train.data.mixture import BLOCK, block_shares
from tokenyard_train.data.shuffle import permute_index


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.text(max_size=5))
def test_a_shuffle_is_a_permutation(size, key):
    assert sorted(permute_index(i, size, key) for i in range(size)) == list(range(size))


def test_a_shuffle_of_any_size_costs_one_lookup():
    assert 0 <= permute_index(123_456_789_012, 10**15, "seed") < 10**15


def test_shuffles_look_random():
    """Neighbours spread evenly (chi-square, 16 bins), and two keys agree only by chance."""
    size = 4096
    one, two = ([permute_index(i, size, key) for i in range(size)] for key in ("1/0", "1/1"))
    jumps = np.diff(one) % size // (size // 16)
    expected = (size - 1) / 16
    chi_square = ((np.bincount(jumps, minlength=16) - expected) ** 2 / expected).sum()
    assert chi_square < 45  # 15 degrees of freedom: p below 1e-4
    assert sum(a == b for a, b in zip(one, two)) < 10
    assert sum(i == a for i, a in enumerate(one)) < 10


def streams(length: int = 4) -> dict[str, Samples]:
    """Three streams. Every token of a stream is the stream's number."""
    sizes = {"a": 401, "b": 41, "c": 2001}
    return {
        name: Samples(np.full(size, number, dtype=np.uint16), length, seed=1)
        for number, (name, size) in enumerate(sizes.items())
    }


WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_every_block_has_each_stream_s_share():
    mixture = Mixture(streams(), WEIGHTS, seed=3)
    for block in (0, 1, 7):
        counts = Counter(mixture.locate(block * BLOCK + i)[0] for i in range(BLOCK))
        assert counts == mixture.shares == block_shares(WEIGHTS)
    assert sum(mixture.shares.values()) == BLOCK
    assert all(
        abs(mixture.shares[name] / BLOCK - weight) <= 1 / BLOCK for name, weight in WEIGHTS.items()
    )


def test_each_stream_is_read_in_its_own_order_without_a_gap():
    mixture = Mixture(streams(), WEIGHTS, seed=3)
    read = dict.fromkeys(WEIGHTS, 0)
    for i in range(2 * BLOCK):
        name, index = mixture.locate(i)
        assert index == read[name]
        read[name] += 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**7), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans())
def test_any_number_of_ranks_reads_the_same_global_order_from_any_step(
    step, world, per_rank, mixed
):
    size = 4 * per_rank

    def fresh():
        return Mixture(streams(), WEIGHTS, seed=3) if mixed else streams()["c"]

    alone = torch.stack([fresh()[step * size + i] for i in range(size)])
    shares = [fresh().batch(step, size, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(shares), alone)


def test_an_interrupted_run_reads_the_same_samples():
    whole = [Mixture(streams(), WEIGHTS, 3).batch(step, 8) for step in range(60)]
    for world, stops in ((1, (17, 41)), (2, (5, 6)), (4, (30, 59))):
        pieces = []
        for first, last in zip((0, *stops), (*stops, 60)):
            # A resumed process knows only the config.
            mixture = Mixture(streams(), WEIGHTS, 3)
            pieces += [
                torch.cat([mixture.batch(step, 8, rank, world) for rank in range(world)])
                for step in range(first, last)
            ]
        assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_a_weight_that_is_too_small_is_named():
    with pytest.raises(
        ConfigError, match=r"streams.b.proportion is 1e-05, less than one sample in 4096; raise it"
    ):
        Mixture(streams(), {"a": 1, "b": 1e-5, "c": 1}, seed=0)


def test_streams_of_a_config(config, text):
    dataset = {
        "streams": {
            "one": {"path": str(text / "a.txt"), "proportion": 3},
            "two": {"path": str(text / "b.txt")},
        }
    }
    mixture = build_data(config(train_loader={"name": "text", "dataset": dataset}).data()).train
    assert isinstance(mixture, Mixture)
    assert mixture.shares == {"one": 3072, "two": 1024}
    assert mixture.batch(0, 4).shape == (4, 25)


def test_an_error_in_a_stream_names_its_key(config, text):
    dataset = {"streams": {"one": {"path": "nowhere"}}}
    with pytest.raises(
        ConfigError, match=r"^train_loader.dataset.streams.one.path 'nowhere' does not exist"
    ):
        build_data(config(train_loader={"name": "text", "dataset": dataset}).data())
    dataset = {"streams": {"one": {"path": str(text)}}}
    with pytest.raises(
        ConfigError, match=r"eval_loader.dataset.streams mixes training text; score one source"
    ):
        build_data(config(eval_loader={"name": "text", "dataset": dataset}).data())
