"""Generation with the KV cache equals generation with full forward passes."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenyard import ConfigError, TokenyardError, moe_layers
from tokenyard.measure.trace import trace
from tokenyard.strategies import SingleStrategy
from tokenyard_models import Dbrx
from tokenyard_train.data import build_tokenizer
from tokenyard_train.data.schema import TokenizerConfig
from tokenyard_train.data.tokenizer import BytesTokenizer
from tokenyard_train.engine import decoding
from tokenyard_train.engine.decoding import DecodingStep
from tokenyard_train.engine.sampling import (
    Sampling,
    continue_texts,
    encode_prompts,
    sample,
    text_after,
)


def model() -> Dbrx:
    net = Dbrx(
        {"size": "tiny", "d_model": 32, "vocab_size": 61},
        dtype=torch.float64,
        compute_dtype=torch.float64,
    )
    net.init_weights(3)
    return net


def test_greedy_with_the_cache_equals_full_passes():
    net = model()
    ids = torch.randint(0, 60, (3, 5))
    rows = ids.clone()
    for _ in range(12):
        rows = torch.cat((rows, net(rows).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert sample(net, ids.tolist(), Sampling(12, 0, 0)) == rows[:, 5:].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_cuda_graph_draws_what_single_launches_draw(monkeypatch, temperature):
    """For prompts of two lengths. One graph is captured, and replayed for all other tokens."""
    sizes = {"size": "tiny", "d_model": 32, "vocab_size": 61}
    net = Dbrx(sizes, device="cuda", backends={"experts": "triton"})
    net.init_weights(3)
    prompts = [torch.randint(0, 60, (size,)).tolist() for size in (5, 8)]
    sampling = Sampling(24, temperature, 7)
    calls: list[torch.Size] = []
    net.register_forward_hook(lambda _, given, output: calls.append(given[0].shape))
    drawn = sample(net, prompts, sampling)
    assert calls == [(2, 5), *[(2, 1)] * 4]  # a prompt, three calls before the capture, and it
    monkeypatch.setattr(decoding, "_FEWEST", 1000)
    assert sample(net, prompts, sampling) == drawn


def test_a_graph_reads_what_kernels_keep_of_weights(monkeypatch):
    """Once for all tokens: their weights are the same."""
    net = model()
    (first, *_), seen = moe_layers(net), []
    kernel = first.experts.kernel
    kernel.weights_have_versions, kernel.captures_weight_copies = True, False
    kernel.renew_weight_copies = lambda weights: seen.append("renewed")

    class Graph:
        def __init__(self, *_):
            assert kernel.captures_weight_copies
            seen.append("captured")

        def replay(self, ids):
            seen.append("replayed")
            return net(ids).logits[:, -1]

    monkeypatch.setattr(decoding, "_Graph", Graph)
    monkeypatch.setattr(decoding, "_can_capture", lambda *_: True)
    sample(net, [[1, 2, 3]], Sampling(4, 0, 0))
    assert seen == ["renewed", "captured", *["replayed"] * 3]
    assert not kernel.captures_weight_copies


@pytest.mark.gpu
def test_tokens_in_fp8_are_computed_from_weights_that_are_rounded_once(monkeypatch):
    sizes = {"size": "tiny", "d_model": 128, "vocab_size": 61}
    ffn = {"ffn_config": {"ffn_hidden_size": 128}}
    backends = {"experts": {"name": "gluon", "precision": "fp8"}}
    bf16 = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}
    net = Dbrx(sizes | ffn, device="cuda", backends=backends, **bf16)
    net.init_weights(3)
    SingleStrategy("cuda").layout(net)
    with torch.no_grad():
        step = DecodingStep(net, net.new_cache(2, 64), 64)
        step.begin(40)
        step(torch.randint(0, 60, (2, 5), device="cuda"))
        ids = torch.randint(0, 60, (2, 1), device="cuda")
        step(ids)
        names = [launch.name for launch in trace((lambda _: step(ids),), ids.device).sequence]
    assert any("quantize_rows" in name for name in names)
    assert not any("quantize_weights" in name for name in names)
    drawn = sample(net, [[1, 2, 3]], Sampling(24, 0, 7))
    monkeypatch.setattr(decoding, "_FEWEST", 1000)
    assert sample(net, [[1, 2, 3]], Sampling(24, 0, 7)) == drawn


def test_each_row_stops_at_its_end_token():
    net = model()
    ids = torch.randint(0, 60, (2, 5))
    free = sample(net, ids.tolist(), Sampling(12, 0, 0))
    end = free[0][4]
    cut = [row[: row.index(end)] if end in row else row for row in free]
    assert sample(net, ids.tolist(), Sampling(12, 0, 0, {end})) == cut


def test_frequencies_follow_the_temperature():
    net = model()
    ids = torch.randint(0, 60, (1, 1))
    want = (net(ids).logits[0, -1] / 0.7).softmax(-1)
    drawn = sample(net, ids.expand(4000, 1).tolist(), Sampling(1, 0.7, 5))
    seen = torch.bincount(torch.tensor(drawn).flatten(), minlength=61) / 4000
    assert (seen - want).abs().max() < 0.04


def test_training_mode_is_restored():
    net = model().train()
    sample(net, [[0]], Sampling(1, 0, 0))
    assert net.training


@pytest.fixture
def metaspace(tmp_path):
    """A tokenizer of words whose first space is dropped, as those of Llama 2 and Mixtral."""
    vocab = {"<unk>": 0, "</s>": 1, "\u2581one": 2, "\u2581two": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return build_tokenizer(TokenizerConfig(name=str(tmp_path), eos_token="</s>"))


def test_the_space_after_a_prompt_is_printed(metaspace):
    assert text_after(metaspace, [2, 3], [3, 3]) == " two two"
    assert text_after(metaspace, [metaspace.end], [3, 3]) == "two two"
    assert text_after(metaspace, [2], [0, 900, -1, 3]) == " two"
    assert text_after(metaspace, [2], []) == ""


def test_a_character_over_the_seam_is_whole():
    first, *rest = "\u00e9t\u00e9".encode()
    tokenizer = BytesTokenizer()
    assert text_after(tokenizer, [120, first], rest) == "\u00e9t\u00e9"
    assert text_after(tokenizer, [120], [first, *rest]) == "\u00e9t\u00e9"


def test_a_continuation_begins_with_its_space(metaspace):
    net = Dbrx({"size": "tiny", "d_model": 32, "vocab_size": 4})
    net.init_weights(0)
    with torch.no_grad():
        net.head.weight[:2] = 0
    texts = continue_texts(net, metaspace, ["one two", "one"], Sampling(4, 0, 0))
    assert all(text.startswith((" one", " two")) for text in texts if text)
    assert any(texts)


def test_a_prompt_without_room_is_refused():
    net = model()
    with pytest.raises(ConfigError, match=r"the prompt has 256 tokens and .* 256; shorten"):
        encode_prompts(net, BytesTokenizer(), ["x" * net.max_seq_len])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_text_is_drawn_from_weights_that_mean_nothing(temperature, value):
    net = model()
    with torch.no_grad():
        net.head.weight[3] = value
    with pytest.raises(TokenyardError, match=r"the model's logits hold nan or inf, so no text can"):
        sample(net, [[1, 2]], Sampling(1, temperature, 0))


def test_a_prompt_of_another_model_s_tokenizer_is_refused():
    with pytest.raises(
        ConfigError, match=r"the prompt 'x' has the id 120, and the model has 61 ids"
    ):
        encode_prompts(model(), BytesTokenizer(), ["\t", "x"])


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match=r"the prompt 'a\\udcff' is not UTF-8 text"):
        encode_prompts(model(), BytesTokenizer(), ["a\udcff"])
