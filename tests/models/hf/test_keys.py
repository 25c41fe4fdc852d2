"""What a config.json says of a model, in the form of every version of transformers, and by what it leaves out."""

import dataclasses
import json
import logging

import pytest
import torch
from hf_models import (
    STRETCHED,
    dbrx,
    llama,
    loaded,
    made,
    mistral,
    mixtral,
    olmoe,
    qwen3,
    qwen3_moe,
)
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenyard import ConfigError
from tokenyard.tolerance import relative_error
from tokenyard_models import WeightsError, from_hf
from tokenyard_models.hf._folder_map import formats

LLAMAS = {
    made_by.__name__: made_by for made_by in (llama, mistral, mixtral, qwen3, qwen3_moe, olmoe)
}


def read(told):
    """Return the TransformerConfig that a config.json tells."""
    hf_format = formats()[told["model_type"]]
    return hf_format.definition.resolve(hf_format.section(told))


@pytest.fixture
def folder(tmp_path):
    """Make a folder of a config, with the keys of its config.json changed."""

    def make(config, **changes):
        model = tmp_path / "model"
        made(config).save_pretrained(model)
        told = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(
            json.dumps({k: v for k, v in told.items() if v != "left out"})
        )
        return model

    return make


@pytest.mark.parametrize("model_type", formats())
def test_what_is_left_out_means_what_transformers_takes(model_type):
    """But for the base of DBRX's rotations, which every folder tells: transformers has another than Databricks."""
    told = {"model_type": model_type} | (
        {"sliding_window": None} if model_type == "mistral" else {}
    )
    got, want = read(told), read(CONFIG_MAPPING[model_type]().to_dict() | told)
    if model_type == "dbrx":
        got = dataclasses.replace(got, rope_theta=want.rope_theta)
    assert got == want


@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("family", LLAMAS)
def test_rotations_as_they_were_told_before_transformers_5(family, kind):
    """The base by itself, and beside it how rotations are stretched."""
    told = LLAMAS[family](rope_parameters=STRETCHED).to_dict()
    want = read(told)
    assert (want.rope_theta, want.rope_scaling.factor) == (500.0, 4.0)
    older = {key: value for key, value in told.items() if key != "rope_parameters"}
    older |= {"rope_theta": 500.0, "rope_scaling": {kind: "llama3"}}
    older["rope_scaling"] |= {
        key: value for key, value in STRETCHED.items() if not key.startswith("rope_")
    }
    assert read(older) == want
    assert read(older | {"rope_scaling": None}) == dataclasses.replace(want, rope_scaling=None)
    assert read(older | {"rope_scaling": {kind: "default"}}) == dataclasses.replace(
        want, rope_scaling=None
    )


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0},
            r"model.rope_scaling.rope_type is 'yarn'; give 'default' or 'llama3'",
        ),
        (
            {"rope_type": "llama3", "factor": 4.0},
            "rope_type llama3 needs low_freq_factor and high_freq_factor and",
        ),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "rotating a part of each head is not supported; say",
        ),
    ],
)
def test_rotations_of_another_kind(section, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(llama().to_dict() | {"rope_scaling": section})


def test_harmless_keys_of_the_first_llamas():
    told = llama().to_dict()
    harmless = {
        "is_llama_config": True,
        "max_sequence_length": 2048,
        "pretraining_tp": 1,
        "rope_interleaved": False,
    }
    assert read(told | harmless) == read(told)
    with pytest.raises(ConfigError, match="rotating neighbours is not supported; say false, where"):
        read(told | {"rope_interleaved": True})


def test_a_folder_in_the_form_of_older_versions(folder):
    """torch_dtype, and the frequencies that old files hold."""
    model = folder(
        mixtral(),
        rope_theta=1e6,
        rope_parameters="left out",
        dtype="left out",
        torch_dtype="float32",
    )
    tensors = load_file(model / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
        model / "model.safetensors",
    )
    assert from_hf(model).config.rope_theta == 1e6


def test_windows_shorter_than_the_text_are_left_out_with_a_word(folder, caplog):
    """Up to the length of a window they change nothing, and the model takes no longer text."""
    config = mistral(sliding_window=8, max_position_embeddings=96)
    model, ids = folder(config), torch.arange(9).unsqueeze(0)
    with caplog.at_level(logging.WARNING, "tokenyard"):
        found = from_hf(model)
    assert f"{model} attends within windows of 8 tokens, which is not supported" in caplog.text
    assert relative_error(found(ids[:, :8]).logits, loaded(model, config)(ids[:, :8]).logits) < 1e-5
    with pytest.raises(ConfigError, match="9 tokens were given to a model whose max_seq_len is 8"):
        found(ids)


def test_a_window_that_someone_asks_for_is_refused():
    told = mistral(sliding_window=8).to_dict()
    with pytest.raises(
        ConfigError, match=r"model.sliding_window is 8, and there are 96 positions; .* at most 8"
    ):
        read(told)
    assert read(told | {"sliding_window": 96}).max_seq_len == 96


def test_weights_whose_dtype_is_not_told_stay_as_they_are(folder):
    model = folder(llama(), dtype="left out")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, model / "model.safetensors"
    )
    assert {p.dtype for p in from_hf(model).parameters()} == {torch.bfloat16}


def test_a_dtype_that_is_not_known(folder):
    with pytest.raises(
        WeightsError, match=r"has dtype 'float8_e4m3fn'; weights are read in: float32, float16, "
    ):
        from_hf(folder(llama(), dtype="float8_e4m3fn"))


def test_keys_that_dbrx_s_sections_leave_out(folder):
    told = dbrx(kv_n_heads=1).to_dict()
    told["attn_config"] = {
        key: value for key, value in told["attn_config"].items() if key != "kv_n_heads"
    }
    assert read(told).kv_heads == 1


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_under_either_name(name):
    told = qwen3_moe().to_dict()
    told = {
        key: value for key, value in told.items() if key not in ("num_experts", "num_local_experts")
    }
    assert read(told | {name: 6}).moe.num_experts == 6
