"""When the memory of a decoder's caches and CUDA graphs is freed."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from tokenyard_models import Dbrx
from tokenyard_models.fixed_cache import FixedCache
from tokenyard_train.engine import decoding
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.sampling import Sampling, sample


def model() -> Dbrx:
    net = Dbrx({"size": "tiny", "d_model": 32, "vocab_size": 61})
    net.init_weights(3)
    return net


def prompt(tokens: int) -> list[int]:
    return torch.randint(0, 60, (tokens,)).tolist()


def test_all_is_freed_with_a_decoder(graph, monkeypatch):
    """At once, also what it replaces."""
    made = []
    begin = decoding._Graph.__init__
    monkeypatch.setattr(
        graph, "__init__", lambda *given: made.append(weakref.ref(given[0])) or begin(*given)
    )
    net = model()
    gc.collect()
    gc.disable()
    try:
        decoder = Decoder()
        for tokens in (5, 8):
            sample(net, [prompt(tokens)], Sampling(6, 0, 0), decoder)
        assert [each() is None for each in made] == [True, False]
        del decoder
        assert [each() is None for each in made] == [True, True]
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["weights", "model"])
def test_nothing_is_kept_of_other_weights_or_of_another_model(graph, change):
    """For no number of prompts. All is freed before the next text begins."""
    decoder = Decoder()
    net = model()
    for rows in (1, 2):
        sample(net, [prompt(5)] * rows, Sampling(6, 0, 0), decoder)
    caches = [weakref.ref(kept.step.cache) for kept in decoder._kept.values()]
    if change == "weights":
        net.head.weight.data = -net.head.weight.data
    else:
        net = model()
    step, _ = decoder.start(net, [prompt(5)], 11)
    gc.collect()
    assert [cache() for cache in caches] == [None, None]
    assert step.cache.length == 0


class PlainCache:
    """The least that a cache of a model must be."""

    def __init__(self, cache):
        self.layers = cache.layers

    @property
    def length(self):
        return self.layers[0].length


def test_a_graph_keeps_the_memory_of_its_fixed_cache(monkeypatch):
    """Also if the model's cache makes a new one for each call of `fixed`."""
    monkeypatch.setattr(decoding, "capture", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    net = model()
    made = []

    class Cache(PlainCache):
        def fixed(self):
            fixed = FixedCache([layer.memory() for layer in self.layers], net.config)
            fixed.move_to(self.length)
            made.append(weakref.ref(fixed))
            return fixed

    cache = Cache(net.new_cache(1, 8))
    with torch.no_grad():
        net(torch.tensor([prompt(5)]), cache)
        graph = decoding._Graph(net, cache, torch.tensor([[7]]))
    gc.collect()
    assert made[0]().position == 6
    del graph
    assert made[0]() is None


def test_a_cache_that_cannot_be_used_again_is_freed_with_its_text(monkeypatch):
    net = model()
    caches = []
    make = net.new_cache

    def new_cache(*sizes):
        cache = PlainCache(make(*sizes))
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(net, "new_cache", new_cache)
    request = (net, [prompt(5)], Sampling(6, 0, 0))
    decoder = Decoder(shares_tokens=True)
    drawn = [sample(*request, decoder) for _ in range(2)]
    assert drawn[0] == drawn[1] == sample(*request)
    gc.collect()
    assert [cache() for cache in caches] == [None] * 3
