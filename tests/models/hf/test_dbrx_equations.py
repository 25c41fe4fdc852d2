"""A DBRX folder against its published equations, computed in float64 from the file's tensors."""

import math

import torch
from hf_models import VOCABULARY, dbrx
from safetensors.torch import load_file
from transformers import DbrxForCausalLM

from tokenyard.tolerance import relative_error
from tokenyard_models import from_hf

HEADS = 4
KV = 2
EXPERTS = 4
TOP_K = 2
F = 12
D = 24
THETA = 5000.0
CLIP = 0.4


def norm(x, weight):
    x = x - x.mean(-1, keepdim=True)
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x):
    """Rotate the pairs (i, i + d/2) of x [S, H, d] at position p by p / theta^(2i/d)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] / THETA ** (torch.arange(half).double() / half)
    first, second = x.split(half, dim=-1)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attention(x, w):
    d = D // HEADS
    qkv = (x @ w["attn.Wqkv.weight"].T).clamp(-CLIP, CLIP).unflatten(-1, (-1, d))
    q, k, v = qkv.split((HEADS, KV, KV), dim=1)
    q = rotated(q)
    k = rotated(k)
    y = torch.empty(len(x), HEADS, d, dtype=torch.float64)
    for t in range(len(x)):
        for h in range(HEADS):
            group = h // (HEADS // KV)
            weights = (k[: t + 1, group] @ q[t, h] / math.sqrt(d)).softmax(-1)
            y[t, h] = weights @ v[: t + 1, group]
    return y.flatten(1) @ w["attn.out_proj.weight"].T


def experts(x, w):
    """Compute (silu(x w1^T) * (x v1^T)) w2; an expert has F rows of w1, v1 and w2."""
    top, ids = (x @ w["router.layer.weight"].T).softmax(-1).topk(TOP_K)
    w1, v1, w2 = (w[f"experts.mlp.{name}"].view(EXPERTS, F, D) for name in ("w1", "v1", "w2"))
    y = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(len(x)) for k in range(TOP_K)):
        e = ids[t, k]
        z = w1[e] @ x[t]
        y[t] += top[t, k] / top[t].sum() * ((z * z.sigmoid() * (v1[e] @ x[t])) @ w2[e])
    return y


def reference(w, ids):
    x = w["transformer.wte.weight"][ids]
    for i in range(2):
        prefix = f"transformer.blocks.{i}."
        block = {key.removeprefix(prefix): value for key, value in w.items() if prefix in key}
        block = {
            key.removeprefix("norm_attn_norm.").removeprefix("ffn."): value
            for key, value in block.items()
        }
        x = x + attention(norm(x, block["norm_1.weight"]), block)
        x = x + experts(norm(x, block["norm_2.weight"]), block)
    return norm(x, w["transformer.norm_f.weight"]) @ w["lm_head.weight"].T


def test_logits(tmp_path):
    """transformers saves the folder; its modelling code does not run."""
    torch.manual_seed(8)
    model = DbrxForCausalLM(
        dbrx(KV, CLIP, THETA, ffn={"ffn_hidden_size": F, "moe_num_experts": EXPERTS})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if parameter.dim() == 1 else 0))
    model.save_pretrained(tmp_path / "dbrx")
    w = {
        key: value.double()
        for key, value in load_file(tmp_path / "dbrx" / "model.safetensors").items()
    }
    ids = torch.randint(0, VOCABULARY, (23,))
    got = from_hf(tmp_path / "dbrx", dtype=torch.float64)(ids[None]).logits[0]
    assert relative_error(got, reference(w, ids)) < 1e-12
