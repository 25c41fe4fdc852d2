"""A folder for MegaBlocks, computed by MegaBlocks' equations."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tokenyard import ConfigError, moe_layers
from tokenyard.tolerance import relative_error
from tokenyard_models import Mixtral, Mpt, Qwen3Moe, WeightsError
from tokenyard_models.hf import to_megablocks

EXPERTS = {"ffn_type": "mb_dmoe", "moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 20}
MODELS = {
    "glu": Mixtral(
        {"size": "tiny", "hidden_size": 24, "intermediate_size": 20, "num_local_experts": 4}
    ),
    "mlp": Mpt({"size": "tiny", "d_model": 24, "n_heads": 2, "ffn_config": EXPERTS}),
    "capacity": Mpt(
        {
            "size": "tiny",
            "d_model": 24,
            "n_heads": 2,
            "ffn_config": EXPERTS | {"ffn_type": "mb_moe", "moe_capacity_factor": 1.25},
        }
    ),
}


def megablocks(x, w, activation, arguments):
    """Compute MegaBlocks' layer, without the slots that exceed a capacity.

    w1, v1 and w2 are [experts * ffn_hidden_size, hidden_size]; with a capacity, w1 is
    [experts, hidden_size, ffn_hidden_size] and w2 [experts, ffn_hidden_size, hidden_size].
    """
    scores = (x @ w["router.layer.weight"].T).softmax(-1)
    weights, ids = scores.topk(2)
    if arguments["moe_normalize_expert_weights"]:
        weights = weights / weights.norm(1, dim=-1, keepdim=True)
    factor = arguments["moe_capacity_factor"]
    capacity = int(factor * 2 * len(x) / 4) or 2 * len(x)
    w1, w2 = (w[f"experts.mlp.{name}"] for name in ("w1", "w2"))
    w1 = w1.transpose(1, 2) if factor else w1.view(4, 20, 24)
    w2 = w2 if factor else w2.view(4, 20, 24)
    assert w1.shape == w2.shape == (4, 20, 24)
    taken = [0] * 4
    y = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(len(x)) for k in range(2)):
        e = ids[t, k]
        taken[e] += 1
        if taken[e] > capacity:
            continue
        a = activation(x[t] @ w1[e].T)
        if "experts.mlp.v1" in w:
            a = a * (x[t] @ w["experts.mlp.v1"].view(4, 20, 24)[e].T)
        y[t] += weights[t, k] * (a @ w2[e])
    return y + w.get("experts.bias", 0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_computes_the_same(tmp_path, kind):
    model = MODELS[kind]
    model.init_weights(7)
    layer = moe_layers(model)[1]
    prefix = "transformer.blocks.1.ffn."
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    to_megablocks(model, tmp_path / "mb")
    tensors = load_file(tmp_path / "mb" / "model.safetensors")
    weights = {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    x = torch.randn(11, 24, generator=torch.Generator().manual_seed(2))
    arguments = json.loads((tmp_path / "mb" / "megablocks.json").read_text())
    assert arguments["mlp_type"] == ("glu" if kind == "glu" else "mlp")
    assert (arguments["moe_num_experts"], arguments["ffn_hidden_size"]) == (4, 20)
    assert arguments["activation_fn"] == (
        {"name": "silu", "approximate": "none"}
        if kind == "glu"
        else {"name": "gelu", "approximate": "tanh"}
    )
    activation = F.silu if kind == "glu" else lambda z: F.gelu(z, approximate="tanh")
    want = megablocks(x, weights, activation, arguments)
    assert relative_error(layer(x)[0], want) < 1e-5
    written = sum(value.numel() for value in tensors.values())
    assert written == sum(p.numel() for p in model.parameters())


def test_what_megablocks_has_no_name_for(tmp_path):
    dense = {"size": "tiny", "mlp_only_layers": [1], "router_aux_loss_coef": 0}
    with pytest.raises(
        WeightsError, match=r"the model's blocks\.1\.ffn\.down has no place in a MegaBlocks folder"
    ):
        to_megablocks(Qwen3Moe(dense), tmp_path / "mb")
    with pytest.raises(
        ConfigError, match="the model has no experts, and MegaBlocks' layers are experts"
    ):
        to_megablocks(Mpt({"size": "tiny"}), tmp_path / "mb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"moe_score_function": "sigmoid"}, "moe.rule.score is 'sigmoid', only 'softmax'"),
        ({"moe_weight_scale": 2.5}, "moe.rule.scale is 2.5, only 1.0"),
        ({"moe_select_first": True}, "moe.rule.select_first is True, only False"),
        ({"moe_num_groups": 2}, "moe.rule.num_groups is 2, only 1"),
        ({"moe_bias_update_rate": 0.1}, "moe.rule.bias_update_rate is 0.1, only 0.0"),
        ({"shared_expert": True}, "moe.shared_dim is 20, only None"),
        (
            {"uniform_expert_assignment": True},
            "uniform_expert_assignment is True, only False; give a model that was trained without",
        ),
        (
            {"ffn_type": "mb_moe", "mlp_type": "glu", "ffn_act_fn": {"name": "silu"}},
            "moe.activation is 'swiglu' where experts have a capacity: MegaBlocks' mb_moe has no",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rules_that_megablocks_has_not(tmp_path, keys, sentence):
    model = Mpt({"size": "tiny", "d_model": 24, "n_heads": 2, "ffn_config": EXPERTS | keys})
    with pytest.raises(
        WeightsError, match=re.escape(f"a MegaBlocks folder cannot say that {sentence}")
    ):
        to_megablocks(model, tmp_path / "mb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ffn_type": "mb_moe", "moe_capacity_factor": 1.25},
        {"ffn_type": "mb_moe", "moe_capacity_factor": 0},
        {"ffn_act_fn": {"name": "relu"}},
        {"ffn_act_fn": {"name": "gelu"}},
        {"ffn_act_fn": {"name": "silu"}, "mlp_type": "glu"},
        {"moe_normalize_expert_weights": 2, "moe_jitter_eps": 0.1},
        {"moe_loss_weight": 0.3, "moe_zloss_weight": 0.01},
    ],
    ids=str,
)
def test_megablocks_json_says_the_whole_rule(tmp_path, keys):
    """LLM Foundry's keys, read from megablocks.json, give the model's layers."""
    model = Mpt({"size": "tiny", "d_model": 24, "n_heads": 2, "ffn_config": EXPERTS | keys})
    to_megablocks(model, tmp_path / "mb")
    arguments = json.loads((tmp_path / "mb" / "megablocks.json").read_text())
    said = {
        key: arguments[key]
        for key in arguments
        if key.startswith("moe_") or key in ("mlp_type", "ffn_hidden_size")
    }
    said |= {
        "ffn_type": "mb_moe" if arguments["moe_capacity_factor"] else "mb_dmoe",
        "ffn_act_fn": arguments["activation_fn"],
    }
    again = Mpt.resolve({"size": "tiny", "d_model": 24, "n_heads": 2, "ffn_config": said})
    assert (again.moe, again.auxiliary) == (model.config.moe, model.config.auxiliary)


def test_transformers_loss_has_no_weight_in_megablocks(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "tokenyard"):
        to_megablocks(Mixtral({"size": "tiny"}), tmp_path / "mb")
    arguments = json.loads((tmp_path / "mb" / "megablocks.json").read_text())
    assert arguments["moe_loss_weight"] is None
    assert "moe_loss_weight is written as null: the model's weight 0.02 is of" in caplog.text
