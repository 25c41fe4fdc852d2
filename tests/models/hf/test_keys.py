"""Reading config.json: the keys of each transformers version, and keys that are left out."""

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


def read(keys):
    """Return the TransformerConfig of a config.json."""
    hf_format = formats()[keys["model_type"]]
    return hf_format.definition.resolve(hf_format.section(keys))


@pytest.fixture
def folder(tmp_path):
    """Make a folder of a config, with changed keys in its config.json."""

    def make(config, **changes):
        model = tmp_path / "model"
        made(config).save_pretrained(model)
        keys = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(
            json.dumps({k: v for k, v in keys.items() if v != "left out"})
        )
        return model

    return make


@pytest.mark.parametrize("model_type", formats())
def test_what_is_left_out_means_what_transformers_takes(model_type):
    """Ignore the base of DBRX's rotary positions: transformers' differs from Databricks'.

    Every DBRX folder has that key.
    """
    keys = {"model_type": model_type} | (
        {"sliding_window": None} if model_type == "mistral" else {}
    )
    got = read(keys)
    want = read(CONFIG_MAPPING[model_type]().to_dict() | keys)
    if model_type == "dbrx":
        got = dataclasses.replace(got, rope_theta=want.rope_theta)
    assert got == want


@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("family", LLAMAS)
def test_rotary_keys_before_transformers_5(family, kind):
    """Read `rope_theta` and `rope_scaling` as two keys."""
    keys = LLAMAS[family](rope_parameters=STRETCHED).to_dict()
    want = read(keys)
    assert (want.rope_theta, want.rope_scaling.factor) == (500.0, 4.0)
    older = {key: value for key, value in keys.items() if key != "rope_parameters"}
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
def test_unsupported_rotary_positions(section, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read(llama().to_dict() | {"rope_scaling": section})


def test_harmless_keys_of_the_first_llamas():
    keys = llama().to_dict()
    harmless = {
        "is_llama_config": True,
        "max_sequence_length": 2048,
        "pretraining_tp": 1,
        "rope_interleaved": False,
    }
    assert read(keys | harmless) == read(keys)
    with pytest.raises(ConfigError, match="rotating neighbours is not supported; say false, where"):
        read(keys | {"rope_interleaved": True})


def test_a_folder_in_the_form_of_older_versions(folder):
    """Read `torch_dtype`, and skip the frequencies that old files hold."""
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


def test_a_window_becomes_the_longest_sequence_with_a_warning(folder, caplog):
    """Up to the length of a window, both models compute the same."""
    config = mistral(sliding_window=8, max_position_embeddings=96)
    path = folder(config)
    ids = torch.arange(9).unsqueeze(0)
    with caplog.at_level(logging.WARNING, "tokenyard"):
        model = from_hf(path)
    assert f"{path} attends within windows of 8 tokens, which is not supported" in caplog.text
    want = loaded(path, config)(ids[:, :8]).logits
    assert relative_error(model(ids[:, :8]).logits, want) < 1e-5
    with pytest.raises(ConfigError, match="9 tokens were given to a model whose max_seq_len is 8"):
        model(ids)


def test_a_short_window_in_a_config_is_refused():
    keys = mistral(sliding_window=8).to_dict()
    with pytest.raises(
        ConfigError, match=r"model.sliding_window is 8, and there are 96 positions; .* at most 8"
    ):
        read(keys)
    assert read(keys | {"sliding_window": 96}).max_seq_len == 96


def test_without_a_dtype_in_config_json_the_stored_dtype_is_kept(folder):
    model = folder(llama(), dtype="left out")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, model / "model.safetensors"
    )
    assert {p.dtype for p in from_hf(model).parameters()} == {torch.bfloat16}


def test_an_unknown_dtype(folder):
    with pytest.raises(
        WeightsError, match=r"has dtype 'float8_e4m3fn'; weights are read in: float32, float16, "
    ):
        from_hf(folder(llama(), dtype="float8_e4m3fn"))


def test_keys_that_dbrx_s_sections_leave_out(folder):
    keys = dbrx(kv_n_heads=1).to_dict()
    keys["attn_config"] = {
        key: value for key, value in keys["attn_config"].items() if key != "kv_n_heads"
    }
    assert read(keys).kv_heads == 1


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_under_either_name(name):
    keys = qwen3_moe().to_dict()
    keys = {
        key: value for key, value in keys.items() if key not in ("num_experts", "num_local_experts")
    }
    assert read(keys | {name: 6}).moe.num_experts == 6


TOOLS = (
    {"unsloth_version": "2026.4.2"},
    {"unsloth_fixed": True},
    {"_attn_implementation_autoset": True},
    {"attn_implementation": "sdpa"},
    {"quantization_config": None},
    {
        "pruned_heads": {},
        "torchscript": False,
        "use_bfloat16": False,
        "tie_encoder_decoder": False,
        "is_decoder": False,
    },
    {"max_length": 4096, "do_sample": True, "temperature": 0.6, "top_k": 50},
    {"layer_types": ["full_attention"] * 2},
    {"pad_token": None, "tokenizer_class": None},
)


@pytest.mark.parametrize("keys", TOOLS, ids=lambda keys: next(iter(keys)))
@pytest.mark.parametrize("family", [*LLAMAS, "dbrx"])
def test_keys_that_other_tools_write(family, keys, caplog):
    original = (LLAMAS | {"dbrx": dbrx})[family]().to_dict()
    assert read(original | keys) == read(original)


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"final_logit_softcapping": 30.0},
        {"partial_rotary_factor": 0.5},
        {"pruned_heads": {"0": [1]}},
        {"is_encoder_decoder": True},
        {"n_shared_experts": 1},
        {"scoring_func": "sigmoid"},
    ],
    ids=lambda keys: next(iter(keys)),
)
@pytest.mark.parametrize("family", [*LLAMAS, "dbrx"])
def test_keys_that_change_what_a_model_computes(family, keys):
    original = (LLAMAS | {"dbrx": dbrx})[family]().to_dict()
    with pytest.raises(ConfigError, match=f"^model.{next(iter(keys))}[^;]* is [^;]*; [^;]*$"):
        read(original | keys)


def test_unknown_keys_of_a_folder_are_one_warning(folder, caplog):
    path = folder(llama(), moe_latent_size=64, invented=[1])
    with caplog.at_level(logging.WARNING, "tokenyard"):
        from_hf(path)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"{path / 'config.json'} has keys that are not known here and are left out: "
        "model.moe_latent_size, model.invented"
    )
