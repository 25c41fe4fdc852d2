"""The routing of a text by a model, compared with counts by hand."""

import json

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models

from tokenyard import ConfigError, moe_layers
from tokenyard_models import Mixtral
from tokenyard_train.commands.options import RoutingOptions
from tokenyard_train.commands.routing import measure, report
from tokenyard_train.commands.routing_counts import route
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config


@pytest.fixture(scope="module")
def model():
    model = Mixtral({"size": "tiny", "num_local_experts": 6, "max_seq_len": 32})
    model.init_weights(3)
    return model


def by_hand(model, ids):
    """Return the set of experts of each token, per layer."""
    chosen = [[] for _ in moe_layers(model)]

    def hook(layer):
        return lambda module, inputs, output: chosen[layer].extend(
            map(set, output[1].topk_ids.tolist())
        )

    hooks = [moe.register_forward_hook(hook(i)) for i, moe in enumerate(moe_layers(model))]
    for sample in ids.split(32):
        model(sample.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return chosen


def test_loads_and_pairs_are_those_counted_by_hand(model):
    """With full samples, and a shorter last one."""
    ids = torch.randint(0, 257, (32 * 9 + 5,), generator=torch.Generator().manual_seed(1))
    for layer, chosen in zip(route(model, ids), by_hand(model, ids), strict=True):
        assert len(chosen) == len(ids)
        for i in range(6):
            tokens = [experts for experts in chosen if i in experts]
            assert layer.load[i] == pytest.approx(len(tokens) / (2 * len(ids)))
            for j in range(6):
                both = sum(j in experts for experts in tokens)
                assert layer.together[i][j] == pytest.approx(
                    both / max(1, len(tokens)) if i != j else 0
                )
        assert layer.busiest == pytest.approx(6 * max(layer.load))


def test_dead_experts_are_named(model):
    """If all tokens take the same experts, the others are dead."""
    router = moe_layers(model)[0].router
    kept = router.weight.data.clone()
    try:
        router.weight.data.zero_()  # equal scores: the lowest ids
        first, *_ = route(model, torch.arange(40))
    finally:
        router.weight.data.copy_(kept)
    assert first.dead == [2, 3, 4, 5]
    assert first.load[:2] == [0.5, 0.5]
    assert first.together[0][1] == 1
    assert first.entropy == pytest.approx(0.387, abs=1e-3)  # ln 2 / ln 6


def test_the_command(tokenyard, trained, text, tmp_path):
    arguments = ["--data", str(text), "--tokens", "900", "--out", str(tmp_path / "out")]
    code, out, errors = tokenyard("routing", str(trained), *arguments)
    assert (code, errors) == (0, "")
    assert "900 tokens" in out
    results = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert results["tokens"] == 900
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in results["records"])
    assert (tmp_path / "out" / "routing.png").stat().st_size > 10_000


def test_mistakes(tmp_path, settings, trained, text):
    def options(model, data):
        return RoutingOptions(model, data, tokens=9, out=tmp_path)

    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"--data '.*empty\.jsonl' holds no text"):
        report(options(trained, tmp_path / "empty.jsonl"), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"--data '.*nowhere' does not exist"):
        report(options(trained, tmp_path / "nowhere"), Console(quiet=True))
    dense = settings | {
        "model": {"name": "mpt_causal_lm", "size": "tiny"},
        "run_name": "dense",
        "max_duration": "1ba",
    }
    train(read_config(dense | {"save_folder": str(tmp_path / "dense")}), Console(quiet=True))
    with pytest.raises(ConfigError, match="has no experts; give one that has"):
        report(options(tmp_path / "dense", text), Console(quiet=True))


def test_a_text_of_another_model_s_tokenizer_is_refused(trained, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 300, "</s>": 0}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "a.txt").write_text("a")
    options = RoutingOptions(trained, tmp_path / "a.txt", 9, tokenizer=str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=r"--data .* has the id 300, and the model has 257 ids"):
        measure(options)
