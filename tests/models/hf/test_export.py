"""What `to_hf` writes loads in transformers and computes the same, or is refused by name."""

import json
import random
import re

import pytest
import torch
from hf_models import made, mistral
from transformers import AutoConfig, AutoModelForCausalLM

from tokenyard.tolerance import relative_error
from tokenyard_models import Dbrx, WeightsError, from_hf, to_hf
from tokenyard_models.families import FAMILIES, load_module
from tokenyard_models.families.llama import Llama
from tokenyard_models.hf import to_megablocks
from tokenyard_models.hf._folder_map import formats
from tokenyard_models.hf._save import config_json
from tokenyard_models.hf._shards import write_weights

DEFINITIONS = {
    name: getattr(load_module(name), path.partition(":")[2]) for name, path in FAMILIES.items()
}
PUBLISHED = {hf_format.name for hf_format in formats().values()}
REFUSED = (
    r"folder cannot say that [a-z_.]+ is .*, only .*"
    r"|transformers would not load this [a-z0-9_]+: .+"
    r"|the model's [\w.]+ has no place in a \w+ folder"
    r"|a mpt_causal_lm has no Hugging Face form here; these have: .+"
)


DENSE_OR_DBRX = ("dbrx", "llama", "qwen3")


def logits_of_both(model, folder):
    """Write a model, and return its logits and those of the model that transformers loads."""
    to_hf(model, folder)
    implementation = (
        {} if model.definition in DENSE_OR_DBRX else {"experts_implementation": "eager"}
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, **implementation).eval()
    ids = torch.randint(0, model.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits, theirs(ids).logits


def initialized(definition, keys):
    """Return a model whose weights are so large that no two router scores are close."""
    model = definition(keys)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1 if parameter.dim() == 1 else 0  # 1 for norms
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + mean)
    return model


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_default_of_every_definition_loads(name, tmp_path):
    got, want = logits_of_both(initialized(DEFINITIONS[name], {"size": "tiny"}), tmp_path / "out")
    assert relative_error(got, want) < 1e-5


def test_a_subclass_that_may_compute_something_else_is_refused(tmp_path):
    class Scaled(DEFINITIONS["mixtral"]):
        """It has the weights of a Mixtral, and scaled embeddings."""

    class Same(DEFINITIONS["mixtral"]):
        definition = "mixtral"

    sentence = "Scaled derives from the mixtral model and may compute something else, so it is not"
    with pytest.raises(WeightsError, match=sentence):
        to_hf(initialized(Scaled, {"size": "tiny"}), tmp_path / "scaled")
    assert not (tmp_path / "scaled").exists()
    to_hf(initialized(Same, {"size": "tiny"}), tmp_path / "same")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_full_size_of_every_definition_is_a_config_of_transformers(name, tmp_path):
    """Without weights: transformers checks the types and sizes of config.json."""
    definition = DEFINITIONS[name]
    hf_format = next(f for f in formats().values() if f.name == name)
    published = config_json(hf_format, definition.resolve({}))
    (tmp_path / "config.json").write_text(json.dumps(published))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == hf_format.model_type
    again = definition.resolve(hf_format.section(theirs.to_dict()))
    assert again.moe == definition.resolve({}).moe


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_have_the_types_of_their_keys(name):
    """A default of 1 for a number with a fraction is 1.0 in JSON."""

    def check(section, where):
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            if hasattr(type(value), "model_fields"):
                check(value, f"{where}.{key}")
            elif field.annotation in (float, float | None) and value is not None:
                assert isinstance(value, float), f"{where}.{key}"

    check(DEFINITIONS[name].schema.model_validate(DEFINITIONS[name].tiny), name)


def random_rope(rng):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 5000,
        "factor": 2,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 16,
    }
    return rng.choice([{}, {}, {"rope_theta": 777}, {"rope_parameters": scaled}])


def random_llama(rng):
    heads = rng.choice([1, 2, 3, 4, 6])
    keys = {
        "size": "tiny",
        "vocab_size": rng.randint(3, 90),
        "hidden_size": rng.choice([12, 20, 24, 30]),
        "intermediate_size": rng.randint(1, 40),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 0.01]),
        "max_position_embeddings": rng.randint(11, 64),
        "tie_word_embeddings": rng.random() < 0.3,
    }
    return keys | random_rope(rng)


def random_experts(rng, key):
    experts = rng.randint(1, 7)
    return random_llama(rng) | {
        key: experts,
        "num_experts_per_tok": rng.randint(1, experts),
        "router_aux_loss_coef": rng.choice([0, 1, 0.01]),
    }


def random_dbrx(rng):
    heads = rng.choice([1, 2, 3, 4])
    experts = rng.randint(1, 7)
    ffn = {
        "ffn_hidden_size": rng.randint(1, 30),
        "ffn_act_fn": {"name": rng.choice(["silu", "gelu", "relu"])},
        "moe_num_experts": experts,
        "moe_top_k": rng.randint(1, experts),
        "moe_normalize_expert_weights": rng.choice([None, 1, 2, 1.5]),
        "moe_jitter_eps": rng.choice([None, 0, 0.1]),
    }
    odd = [
        {"moe_score_function": "sigmoid"},
        {"moe_bias_update_rate": 0.1},
        {"shared_expert": True},
        {"moe_weight_scale": 2},
        {"ffn_type": "mb_moe"},
        {"mlp_type": "mlp"},
        {"moe_select_first": True},
        {"uniform_expert_assignment": True},
    ]
    return {
        "size": "tiny",
        "d_model": 4 * heads * rng.randint(1, 3),
        "n_heads": heads,
        "n_layers": rng.randint(1, 3),
        "vocab_size": rng.randint(3, 90),
        "attn_config": {
            "kv_n_heads": rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
            "clip_qkv": rng.choice([8, 0.5, 1, None]),
            "rope_theta": rng.choice([1000, 500000.0]),
        },
        "ffn_config": ffn | rng.choice([*[{}] * 8, *odd]),
        "tie_word_embeddings": rng.random() < 0.1,
    }


def random_model(seed):
    """Return the definition and keys of a random native model."""
    rng = random.Random(seed)
    name = sorted(DEFINITIONS)[seed % len(DEFINITIONS)]
    if name == "dbrx":
        return name, random_dbrx(rng)
    if name == "mpt_causal_lm":
        return name, {"size": "tiny", "n_layers": 1, "d_model": 16, "n_heads": 2}
    if name == "mixtral":
        keys = random_experts(rng, "num_local_experts")
        return name, keys | {"head_dim": 2 * rng.randint(1, 5)}
    if name == "olmoe":
        keys = random_experts(rng, "num_experts")
        size = 2 * keys["num_attention_heads"] * rng.randint(1, 5)
        return name, keys | {"hidden_size": size, "clip_qkv": rng.choice([None, 1, 0.5])}
    head_dim = {"head_dim": 2 * rng.randint(1, 5)}
    if name == "qwen3_moe":
        keys = random_experts(rng, "num_experts") | {"moe_intermediate_size": rng.randint(1, 30)}
        dense = rng.choice([[], [0]])
        return name, keys | head_dim | {"mlp_only_layers": dense}
    return name, random_llama(rng) | head_dim


@pytest.mark.parametrize("seed", range(28))
def test_a_random_native_model_loads_or_is_refused_by_name(seed, tmp_path):
    name, keys = random_model(seed)
    model = initialized(DEFINITIONS[name], keys)
    refusal = None
    try:
        got, want = logits_of_both(model, tmp_path / "out")
    except WeightsError as error:
        refusal = str(error)
    if refusal is None:
        assert relative_error(got, want) < 1e-5
        return
    assert re.search(REFUSED, refusal)
    assert name in ("dbrx", "mpt_causal_lm")
    assert not list(tmp_path.iterdir())


ODD = {"hidden_size": 20, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6}


@pytest.mark.parametrize("odd", [{}, ODD], ids=["even", "odd"])
def test_a_mistral_goes_out_as_a_mistral(tmp_path, odd):
    hf_model = made(mistral(**odd))
    hf_model.save_pretrained(tmp_path / "theirs")
    model = from_hf(tmp_path / "theirs")
    to_hf(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "mistral"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(hf_model)
    ids = torch.arange(1, 12).unsqueeze(0)
    assert torch.equal(back(ids).logits, hf_model(ids).logits)


@pytest.mark.parametrize(("odd", "model_type"), [({}, "llama"), (ODD, "mistral")])
def test_a_native_llama_goes_out_as_what_transformers_loads(tmp_path, odd, model_type):
    to_hf(initialized(Llama, {"size": "tiny"} | odd), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_the_activation_of_dbrx_is_written(tmp_path, name):
    model = initialized(Dbrx, {"size": "tiny", "ffn_config": {"ffn_act_fn": {"name": name}}})
    got, want = logits_of_both(model, tmp_path / "out")
    assert relative_error(got, want) < 1e-5
    assert from_hf(tmp_path / "out").config.moe == model.config.moe


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"attn_config": {"clip_qkv": None}}, "attn_config.clip_qkv is null"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ],
)
def test_a_dbrx_that_transformers_cannot_load(tmp_path, keys, sentence):
    with pytest.raises(WeightsError, match=f"transformers would not load this dbrx: {sentence}"):
        to_hf(Dbrx({"size": "tiny"} | keys), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_token_ids_are_not_made_up(tmp_path):
    """transformers' defaults are those of other vocabularies."""
    to_hf(initialized(DEFINITIONS["olmoe"], {"size": "tiny"}), tmp_path / "out")
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, None)


def test_what_is_written_is_read_back(tmp_path, monkeypatch):
    """A writer that leaves a tensor out is found before the folder appears."""
    whole = "tokenyard_models.hf._save.write_weights"

    def without_the_head(folder, folder_map, *rest):
        write_weights(folder, {k: v for k, v in folder_map.items() if "lm_head" not in k}, *rest)

    monkeypatch.setattr(whole, without_the_head)
    with pytest.raises(WeightsError, match=r"lacks lm_head\.weight"):
        to_hf(Dbrx({"size": "tiny"}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [to_hf, to_megablocks])
def test_every_buffer_has_a_place_or_is_named(tmp_path, write):
    model = initialized(Dbrx, {"size": "tiny"})
    model.blocks[1].ffn.register_buffer("statistics", torch.zeros(3))
    sentence = r"the model's blocks\.1\.ffn\.statistics has no place in a \w+ folder"
    with pytest.raises(WeightsError, match=sentence):
        write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
