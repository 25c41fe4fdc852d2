"""CUDA graphs that a decoder keeps compute what those of a new one do, bit for bit."""

import gc

import pytest
import torch
from torch import nn

from tokenyard.strategies import SingleStrategy
from tokenyard_models import Dbrx
from tokenyard_train.engine import decoding
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.sampling import Sampling, sample

pytestmark = pytest.mark.gpu

TEXTS = [(5, 24), (1, 40), (13, 24), (20, 3), (8, 24)]
"""Tokens of a prompt, and new ones: the memory of all caches is that of 64 tokens."""


@pytest.fixture(params=["fp32", "bf16", "fp8"])
def net(request):
    """A model whose experts are computed by our kernels, in FP8 from copies that are kept."""
    if request.param == "fp32":
        config = {"size": "tiny", "d_model": 32, "vocab_size": 61}
        model = Dbrx(config, device="cuda", backends={"experts": "triton"})
    else:
        ffn = {"ffn_config": {"ffn_hidden_size": 128}}
        config = {"size": "tiny", "d_model": 128, "vocab_size": 61} | ffn
        precision = {"precision": "fp8"} if request.param == "fp8" else {}
        bf16 = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}
        backends = {"experts": {"name": "gluon"} | precision}
        model = Dbrx(config, device="cuda", backends=backends, **bf16)
    model.init_weights(3)
    SingleStrategy("cuda").layout(model)
    return model


@pytest.fixture
def captures(monkeypatch):
    """A list that grows with each capture."""
    captured = []
    capture = decoding._Graph.__init__
    monkeypatch.setattr(
        decoding._Graph, "__init__", lambda *given: captured.append(1) or capture(*given)
    )
    return captured


def prompts(tokens, rows=2):
    return [torch.randint(0, 60, (tokens + row,)).tolist() for row in range(rows)]


def drawn(monkeypatch, *request):
    """Return the ids of a text, and the logits [steps, B, V] that they were drawn from."""
    logits = []
    call = decoding.DecodingStep.__call__

    def noted(self, ids):
        logits.append(call(self, ids).clone())
        return logits[-1]

    with monkeypatch.context() as patches:
        patches.setattr(decoding.DecodingStep, "__call__", noted)
        rows = sample(*request)
    return rows, torch.stack(logits)


def assert_equals_a_new_one(monkeypatch, net, given, sampling, decoder):
    rows, logits = drawn(monkeypatch, net, given, sampling, decoder)
    # steps of a text that is too short for a graph are launched one by one
    monkeypatch.setattr(decoding, "_FEWEST", 1)
    want_rows, want = drawn(monkeypatch, net, given, sampling)
    assert rows == want_rows
    assert torch.equal(logits, want)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_later_texts_replay_the_graph_of_the_first(monkeypatch, net, captures, temperature):
    decoder = Decoder()
    sample(net, prompts(40), Sampling(22, temperature, 7), decoder)  # the longest
    for tokens, new_tokens in TEXTS:
        given, sampling = prompts(tokens), Sampling(new_tokens, temperature, 7)
        captures.clear()
        sample(net, given, sampling, decoder)
        assert not captures
        assert_equals_a_new_one(monkeypatch, net, given, sampling, decoder)


def test_a_longer_memory_changes_no_bit(monkeypatch, net):
    """Tokens that are not there have a weight of 0."""
    decoder = Decoder()
    sample(net, prompts(180), Sampling(40, 0, 7), decoder)
    assert_equals_a_new_one(monkeypatch, net, prompts(9), Sampling(24, 0, 7), decoder)


def test_a_turn_of_a_chat_replays_the_graph_of_the_one_before(monkeypatch, net, captures):
    decoder, other = (Decoder(spare=100, shares_tokens=True) for _ in range(2))
    (turn,) = prompts(9, rows=1)
    for first in (True, False, False):
        captures.clear()
        rows, logits = drawn(monkeypatch, net, [turn], Sampling(20, 0, 7), decoder)
        assert len(captures) == first
        for kept in other._kept.values():
            kept.step._graph = None
        want_rows, want = drawn(monkeypatch, net, [turn], Sampling(20, 0, 7), other)
        assert len(captures) == first + 1
        assert rows == want_rows
        assert torch.equal(logits, want)
        turn = [*turn, *rows[0], *prompts(4, rows=1)[0]]


def test_weights_that_changed_in_place_are_seen(monkeypatch, net, captures):
    decoder = Decoder()
    given, sampling = prompts(5), Sampling(24, 0, 7)
    _, before = drawn(monkeypatch, net, given, sampling, decoder)
    for _ in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        captures.clear()
        _, after = drawn(monkeypatch, net, given, sampling, decoder)
        assert not captures
        assert not torch.equal(before, after)
        assert_equals_a_new_one(monkeypatch, net, given, sampling, decoder)


def test_weights_that_were_replaced_are_captured_anew(monkeypatch, net, captures):
    decoder = Decoder()
    given, sampling = prompts(5), Sampling(24, 0, 7)
    sample(net, given, sampling, decoder)
    experts = net.blocks[0].ffn.experts
    experts.up = nn.Parameter(experts.up.detach() * 1.5)
    captures.clear()
    sample(net, given, sampling, decoder)
    assert len(captures) == 1
    assert_equals_a_new_one(monkeypatch, net, given, sampling, decoder)


def test_the_memory_of_a_decoder_is_freed_with_it(net):
    gc.collect()
    gc.disable()
    try:
        allocated = []
        for _ in range(5):
            decoder = Decoder()
            sample(net, prompts(5, rows=64), Sampling(24, 0, 7), decoder)
            del decoder
            allocated.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert allocated[-1] <= allocated[1]
