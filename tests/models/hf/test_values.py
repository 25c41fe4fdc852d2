"""Weights that a folder holds are read as they are, or named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenyard import ConfigError
from tokenyard_models import Llama, Upcycling, WeightsError, from_hf, to_hf, upcycle

NORM = "model.norm.weight"
SIZES = {"size": "tiny", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 16}


@pytest.fixture
def write(tmp_path):
    """Write a Llama whose config.json and tensors are changed; return the folder."""

    def write(config, tensors, **keys):
        torch.manual_seed(1)
        model = Llama(SIZES | keys)
        model.init_weights(1)
        to_hf(model, tmp_path / "hf", dtype=torch.float32)
        path = tmp_path / "hf" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        weights = tmp_path / "hf" / "model.safetensors"
        save_file(load_file(weights) | tensors, weights, {"format": "pt"})
        return tmp_path / "hf"

    return write


def test_a_tied_head_of_other_values_is_refused(write, tmp_path):
    tied = {"tie_word_embeddings": True}
    folder = write({}, {"lm_head.weight": torch.ones(40, 32)}, **tied)
    said = "tie_word_embeddings true, and lm_head.weight has other values than model.embed_tokens"
    with pytest.raises(WeightsError, match=said):
        from_hf(folder)
    with pytest.raises(WeightsError, match=said):
        upcycle(folder, tmp_path / "moe", Upcycling(4, 2, 1, 1))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    same = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": same}, weights, {"format": "pt"})
    assert torch.equal(from_hf(folder).embed.weight, same)


def test_a_cast_to_infinity_is_refused(write, tmp_path):
    folder = write({"dtype": "float16"}, {NORM: torch.full((32,), 1e5)})
    said = "model.norm.weight in .* has values up to 1e.05, which are infinite in float16"
    with pytest.raises(WeightsError, match=said):
        from_hf(folder)
    model = from_hf(folder, dtype=torch.float32)
    assert model.norm.weight.max() == 1e5
    with pytest.raises(WeightsError, match=r"^norm.weight has values up to 1e.05.* --dtype"):
        to_hf(model, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_narrowed_tensors_are_named(write, caplog):
    exact = torch.full((32,), 1 + 2**-12)
    folder = write({"dtype": "bfloat16"}, {NORM: exact})
    assert from_hf(folder).norm.weight.max() == 1
    assert "has dtype bfloat16, and" in caplog.text
    caplog.clear()
    assert torch.equal(from_hf(folder, dtype=torch.float32).norm.weight, exact)
    assert caplog.text == ""


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named_once(write, tmp_path, caplog, value):
    folder = write({}, {NORM: torch.full((32,), value)})
    model = from_hf(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"model.norm.weight holds nan or inf in {folder}"
    ]
    to_hf(model, tmp_path / "again")
    assert len(caplog.records) == 2


def test_two_values_of_rope_theta_are_refused():
    sections = {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_theta": 1e4}}
    with pytest.raises(ConfigError, match=r"rope_theta is 500000.0 and .* 10000.0; .* set one"):
        Llama.resolve(SIZES | sections)
    sections["rope_scaling"]["rope_theta"] = 5e5
    assert Llama.resolve(SIZES | sections).rope_theta == 5e5
