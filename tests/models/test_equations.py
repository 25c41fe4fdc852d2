"""DBRX and Mixtral against float64 implementations of their published equations."""

import math

import pytest
import torch

from tokenyard.tolerance import relative_error
from tokenyard_models import Dbrx, Mixtral, Transformer

B = 2
S = 13


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the pairs (i, i + d/2) of x [B, S, H, d] at position p by p / theta^(2i/d)."""
    d = x.shape[-1]
    out = torch.empty_like(x)
    for p in range(x.shape[1]):
        for i in range(d // 2):
            angle = p / theta ** (2 * i / d)
            a = x[:, p, :, i]
            b = x[:, p, :, i + d // 2]
            out[:, p, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, p, :, i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(
    x: torch.Tensor, w: dict, name: str, heads: int, kv: int, theta: float, clip: float | None
) -> torch.Tensor:
    d = w[f"{name}.out.weight"].shape[1] // heads
    qkv = x @ w[f"{name}.qkv.weight"].T
    if clip is not None:
        qkv = qkv.clamp(-clip, clip)
    q, k, v = (t.unflatten(-1, (-1, d)) for t in qkv.split((heads * d, kv * d, kv * d), -1))
    q = rotated(q, theta)
    k = rotated(k, theta)
    k, v = (t.repeat_interleave(heads // kv, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
    later = torch.ones(S, S).triu(1).bool()
    y = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -math.inf).softmax(-1), v)
    return y.flatten(2) @ w[f"{name}.out.weight"].T


def experts(x: torch.Tensor, w: dict, name: str, top_k: int) -> torch.Tensor:
    probs = (x @ w[f"{name}.router.weight"].T).softmax(-1)
    top, ids = probs.topk(top_k, -1)
    weight = torch.zeros_like(probs).scatter(-1, ids, top / top.sum(-1, keepdim=True))
    gate, up = torch.einsum("bsd,efd->bsef", x, w[f"{name}.experts.up"]).chunk(2, -1)
    hidden = gate * torch.sigmoid(gate) * up
    return torch.einsum("bsef,edf,bse->bsd", hidden, w[f"{name}.experts.down"], weight)


def layer_norm(x, weight):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def reference(model: Transformer, ids: torch.Tensor, norm, clip: float | None) -> torch.Tensor:
    w = dict(model.named_parameters())
    c = model.config
    x = w["embed.weight"][ids]
    for i in range(c.layers):
        block = f"blocks.{i}"
        normed = norm(x, w[f"{block}.norm_1.weight"])
        x = x + attention(normed, w, f"{block}.attention", c.heads, c.kv_heads, c.rope_theta, clip)
        x = x + experts(norm(x, w[f"{block}.norm_2.weight"]), w, f"{block}.ffn", c.moe.top_k)
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


DBRX = (
    Dbrx,
    {"d_model": 24, "ffn_config": {"ffn_hidden_size": 20}, "attn_config": {"clip_qkv": 0.7}},
    layer_norm,
    0.7,
)
MIXTRAL = Mixtral, {"hidden_size": 24, "intermediate_size": 20, "rope_theta": 1e6}, rms_norm, None


@pytest.mark.parametrize(
    ("cls", "config", "norm", "clip"), [DBRX, MIXTRAL], ids=["dbrx", "mixtral"]
)
def test_logits_and_all_gradients(cls, config, norm, clip):
    model = cls(
        {"size": "tiny", "vocab_size": 40} | config,
        dtype=torch.float64,
        compute_dtype=torch.float64,
    )
    model.init_weights(1)
    for parameter in model.parameters():  # norms off one, everything large enough to matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(0, 40, (B, S))
    got = model(ids).logits
    want = reference(model, ids, norm, clip)
    assert relative_error(got, want) < 1e-12
    dy = torch.randn_like(want)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got, parameters, dy), torch.autograd.grad(want, parameters, dy)
    ):
        assert relative_error(a, b) < 1e-12


def test_clipping_changes_the_logits():
    """So the test above would fail without the clamp."""
    model = Dbrx(
        {"size": "tiny", "vocab_size": 40} | DBRX[1],
        dtype=torch.float64,
        compute_dtype=torch.float64,
    )
    model.init_weights(1)
    ids = torch.randint(0, 40, (B, S))
    assert relative_error(model(ids).logits, reference(model, ids, layer_norm, None)) > 1e-3
