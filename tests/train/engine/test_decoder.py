"""What a decoder keeps from one text to the next: tokens, caches, and CUDA graphs."""

import pytest
import torch
from torch import nn

from tokenyard import ConfigError, moe_layers
from tokenyard.adapter import LoraAdapter, LoraSettings
from tokenyard.tolerance import relative_error
from tokenyard_models import Dbrx, Mpt
from tokenyard_train.engine import decoder as decoder_module
from tokenyard_train.engine import decoding
from tokenyard_train.engine.decoder import Decoder
from tokenyard_train.engine.precision import computing_in
from tokenyard_train.engine.sampling import Sampling, sample

SIZES = {"size": "tiny", "d_model": 32, "vocab_size": 61}


def model(more=None, **options) -> Dbrx:
    net = Dbrx(SIZES | (more or {}), **options)
    net.init_weights(3)
    return net


def prompt(tokens: int) -> list[int]:
    return torch.randint(0, 60, (tokens,)).tolist()


def test_tokens_that_a_prompt_shares_are_not_computed_again():
    """With equal logits: after an appended turn, after a changed one, and for the same prompt."""
    net = model(dtype=torch.float64, compute_dtype=torch.float64)
    decoder = Decoder(shares_tokens=True)
    first = prompt(9)
    answer = sample(net, [first], Sampling(4, 0, 0), decoder)[0]
    appended = [*first, *answer, 7, 8, 9]
    for given, computed in (
        (appended, 4),  # the last token of an answer is not in the cache yet
        ([*appended[:11], 60, 5], 2),
        ([*appended[:11], 60, 5], 1),
        ([60, *first], 10),
    ):
        sizes, logits = calls_of(net, given, decoder)
        assert sizes == [computed, 1, 1]
        ids = [*given, *logits.argmax(-1)[0].tolist()]
        whole = net(torch.tensor([ids])).logits[:, len(given) - 1 : -1]
        assert relative_error(logits, whole) < 1e-12


def calls_of(net, given, decoder) -> tuple[list[int], torch.Tensor]:
    """Return the tokens of each call for 3 new tokens, and the logits [1, 3, V] of each."""
    calls: list[tuple[int, torch.Tensor]] = []
    hook = net.register_forward_hook(
        lambda _, args, output: calls.append((args[0].shape[1], output.logits[:, -1:]))
    )
    sample(net, [given], Sampling(3, 0, 0), decoder)
    hook.remove()
    sizes, logits = zip(*calls)
    return list(sizes), torch.cat(logits, 1)


def test_tokens_are_computed_again_after_a_change_of_weights_and_without_sharing():
    net = model()
    given = prompt(9)
    sharing, other = Decoder(shares_tokens=True), Decoder()
    for decoder in (sharing, other):
        sample(net, [given], Sampling(4, 0, 0), decoder)
    assert calls_of(net, given, other)[0] == [9, 1, 1]
    with torch.no_grad():
        net.embed.weight.neg_()
    assert calls_of(net, given, sharing)[0] == [9, 1, 1]
    assert sample(net, [given], Sampling(4, 0, 0), sharing) == sample(
        net, [given], Sampling(4, 0, 0)
    )


def test_tokens_are_computed_again_after_a_change_of_a_selection_bias():
    net = model({"ffn_config": {"moe_bias_update_rate": 0.1}})
    given = prompt(9)
    decoder = Decoder(shares_tokens=True)
    sample(net, [given], Sampling(4, 0, 0), decoder)
    for moe in moe_layers(net):
        moe.router.update(torch.arange(moe.workload.num_experts))
    assert calls_of(net, given, decoder)[0] == [9, 1, 1]


def test_texts_that_fit_take_one_graph_and_are_those_of_a_new_one(graph):
    net = model()
    decoder = Decoder(spare=4)
    for tokens, new_tokens in ((9, 12), (1, 5), (13, 12), (4, 18)):
        for temperature in (0, 0.9):
            given = [prompt(tokens), prompt(tokens + 1)]
            request = (net, given, Sampling(new_tokens, temperature, 5))
            graph.captures = 0
            got = sample(*request, decoder)
            first = tokens == 9 and temperature == 0
            assert graph.captures == first
            assert got == sample(*request)
    graph.captures = 0
    sample(net, [prompt(9), prompt(15)], Sampling(12, 0, 5), decoder)
    assert graph.captures == 1  # 27 tokens and 26 of the cache


def test_a_graph_computes_no_text_that_is_too_long_for_the_model(graph):
    net = model({"max_seq_len": 16})
    decoder = Decoder(spare=8)
    assert len(sample(net, [prompt(5)], Sampling(12, 0, 5), decoder)[0]) == 12
    with pytest.raises(ConfigError, match=r"the text has 17 tokens .* max_seq_len is 16"):
        sample(net, [prompt(5)], Sampling(13, 0, 5), decoder)


def test_a_cache_that_is_far_too_large_is_replaced(graph, monkeypatch):
    """Attention reads all of it for each token."""
    monkeypatch.setattr(decoder_module, "_SMALL", 20)
    net = model()
    decoder = Decoder()
    captured = []
    for tokens in (90, 22, 16, 12, 14, 2):  # and 4 new ones: 94 is more than 4 times 20
        graph.captures = 0
        sample(net, [prompt(tokens)], Sampling(4, 0, 5), decoder)
        captured.append(graph.captures)
    assert captured == [1, 0, 1, 0, 0, 0]


def test_a_graph_is_kept_for_each_of_two_numbers_of_prompts(graph):
    net = model()
    decoder = Decoder()
    captured = []
    for rows in (1, 2, 1, 2, 3, 2, 1, 3):
        graph.captures = 0
        sample(net, [prompt(3) for _ in range(rows)], Sampling(4, 0, 5), decoder)
        captured.append(graph.captures)
    assert captured == [1, 1, 0, 0, 1, 0, 1, 1]


def replaced(net):
    net.head.weight = nn.Parameter(-net.head.weight)


def moved(net):
    net.head.weight.data = -net.head.weight.data


def in_place(net):
    net.head.weight.data.neg_()


@pytest.mark.parametrize(("change", "captures"), [(replaced, 1), (moved, 1), (in_place, 0)])
def test_other_weights_need_a_new_graph_unless_they_changed_in_place(graph, change, captures):
    net = model()
    decoder = Decoder()
    request = (net, [prompt(5)], Sampling(6, 0, 0))
    before = sample(*request, decoder)
    change(net)
    graph.captures = 0
    after = sample(*request, decoder)
    assert graph.captures == captures
    assert before != after == sample(*request)


def test_another_model_or_autocast_needs_a_new_graph(graph):
    net, other = (Mpt(SIZES) for _ in range(2))  # experts would be for one dtype
    for each in (net, other):
        each.init_weights(3)
    net.requires_grad_(False)
    decoder = Decoder()
    request = ([prompt(5)], Sampling(6, 0, 0))
    captured = []
    for each, precision in (
        (net, "fp32"),
        (net, "amp_bf16"),
        (net, "amp_bf16"),
        (net, "fp32"),
        (other, "fp32"),
        (other, "amp_bf16"),
        (other, "amp_bf16"),
    ):
        graph.captures = 0
        with computing_in(precision, torch.device("cpu")):
            sample(each, *request, decoder)
        captured.append(graph.captures)
    # autocast keeps copies of the other's weights, which require gradients, until it ends
    assert captured == [1, 1, 0, 1, 1, 1, 1]


def test_a_text_after_one_in_inference_mode_has_a_cache_that_it_can_write_to(graph):
    net = model()
    decoder = Decoder()
    request = (net, [prompt(5)], Sampling(6, 0, 0))
    with torch.inference_mode():
        inside = sample(*request, decoder)
    assert inside == sample(*request, decoder)
    assert graph.captures == 2


def test_another_scale_of_adapters_or_precision_of_matmuls_needs_a_new_graph(graph):
    """A graph has both as they were when it was captured."""
    net = model()
    adapter = LoraAdapter({"weight": net.embed.weight}, {}, LoraSettings(2, 4.0))
    net.register_module("adapter", adapter)
    decoder = Decoder()
    request = (net, [prompt(5)], Sampling(6, 0, 0))
    sample(*request, decoder)
    adapter.settings = LoraSettings(2, 4.0)
    sample(*request, decoder)
    assert graph.captures == 1
    adapter.settings = LoraSettings(2, 8.0)
    sample(*request, decoder)
    assert graph.captures == 2
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        sample(*request, decoder)
    finally:
        matmul.fp32_precision = before
    assert graph.captures == 3


def test_copies_of_weights_are_renewed_for_each_text(graph, monkeypatch):
    renewed = []
    monkeypatch.setattr(decoding, "renew_weight_copies", renewed.append)
    net = model()
    decoder = Decoder()
    for _ in range(3):
        sample(net, [prompt(5)], Sampling(6, 0, 0), decoder)
    assert renewed == [moe_layers(net)] * 2  # the capture renews them, too


def test_a_text_that_fails_leaves_nothing(graph):
    net = model()
    decoder = Decoder()
    sample(net, [prompt(5)], Sampling(6, 0, 0), decoder)

    def fail(prompt, ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(net, [prompt(5)], Sampling(6, 0, 0, complete=fail), decoder)
    graph.captures = 0
    sample(net, [prompt(5)], Sampling(6, 0, 0), decoder)
    assert graph.captures == 1
