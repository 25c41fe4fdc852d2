"""A folder for MegaBlocks, computed by MegaBlocks' equations."""

import json

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
}


def megablocks(x, w, activation, normalize):
    """Compute MegaBlocks' dropless layer.

    w1, v1 and w2 are [experts * ffn_hidden_size, hidden_size].
    """
    scores = (x @ w["router.layer.weight"].T).softmax(-1)
    weights, ids = scores.topk(2)
    weights = weights / weights.norm(1, dim=-1, keepdim=True) if normalize else weights
    w1, w2 = (w[f"experts.mlp.{name}"].view(4, 20, 24) for name in ("w1", "w2"))
    y = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(len(x)) for k in range(2)):
        e = ids[t, k]
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
    assert (arguments["mlp_type"], arguments["moe_num_experts"], arguments["ffn_hidden_size"]) == (
        kind,
        4,
        20,
    )
    activation = F.silu if kind == "glu" else lambda z: F.gelu(z, approximate="tanh")
    want = megablocks(x, weights, activation, arguments["moe_normalize_expert_weights"])
    assert relative_error(layer(x)[0], want) < 1e-5
    written = sum(value.numel() for value in tensors.values())
    assert written == sum(p.numel() for p in model.parameters())


def test_what_megablocks_has_no_name_for(tmp_path):
    dense = {"size": "tiny", "mlp_only_layers": [1]}
    with pytest.raises(
        WeightsError, match=r"the model's blocks\.1\.ffn\.down has no place in a MegaBlocks folder"
    ):
        to_megablocks(Qwen3Moe(dense), tmp_path / "mb")
    with pytest.raises(
        ConfigError, match="the model has no experts, and MegaBlocks' layers are experts"
    ):
        to_megablocks(Mpt({"size": "tiny"}), tmp_path / "mb")
    assert not list(tmp_path.iterdir())
