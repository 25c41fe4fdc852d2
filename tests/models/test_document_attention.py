"""Attention within documents: every way of computing it gives the same."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from tokenyard import PADDING, ConfigError, pack_documents
from tokenyard.tolerance import relative_error
from tokenyard_models import Dbrx, Mixtral, document_attention

IDS = torch.tensor([[0] * 5 + [1] * 7 + [PADDING] * 4, [0] * 16, [0] + [1] * 8 + [2] * 7])


def drawn(dtype: torch.dtype, device: str, kv_heads: int = 2):
    return [
        torch.randn(3, heads, 16, 8, dtype=dtype, device=device).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


def with_gradients(attend, qkv, documents) -> list[torch.Tensor]:
    y = attend(*qkv, documents)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), qkv)]


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_by_one_equals_the_mask(kv_heads):
    qkv = drawn(torch.float64, "cpu", kv_heads)
    documents = pack_documents(IDS, count=12)
    got = with_gradients(document_attention._one_by_one, qkv, documents)
    want = with_gradients(document_attention._masked, qkv, documents)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-13


def reference_varlen(q, k, v, offsets, longest, gqa):
    """What flash attention computes, for q [tokens, heads, head_dim], on a CPU."""
    results = []
    for start, end in pairwise(offsets.tolist()):
        assert end - start <= longest
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=gqa)
        results.append(y[0].transpose(0, 1))
    return torch.cat(results)


def newest(q, k, v, offsets, _, longest, __, *, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0)
    return reference_varlen(q, k, v, offsets, longest, enable_gqa)


def without_gqa(q, k, v, offsets, _, longest, __, *, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return reference_varlen(q, k, v, offsets, longest, False)


def oldest(q, k, v, offsets, _, longest, __, is_causal=False):
    assert is_causal
    return reference_varlen(q, k, v, offsets, longest, False)


@pytest.mark.parametrize("version", [newest, without_gqa, oldest])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_gets_the_arguments_of_each_version_of_torch(version, kv_heads, monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", version)
    qkv = drawn(torch.float64, "cpu", kv_heads)
    documents = pack_documents(IDS, count=12)
    got = with_gradients(document_attention._by_flash, qkv, documents)
    want = with_gradients(document_attention._masked, qkv, documents)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_equals_float64(dtype):
    qkv = drawn(dtype, "cuda")
    documents = pack_documents(IDS.cuda(), count=12, longest=20)
    got = with_gradients(document_attention.attend_within_documents, qkv, documents)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want = with_gradients(document_attention._masked, exact, documents)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 4 * torch.finfo(dtype).eps


def test_a_row_of_one_document_is_the_row():
    model = Mixtral(
        {"size": "tiny", "vocab_size": 61}, dtype=torch.float64, compute_dtype=torch.float64
    )
    model.init_weights(0)
    ids = torch.randint(0, 61, (2, 16))
    documents = pack_documents(torch.zeros(2, 16, dtype=torch.int64))
    assert relative_error(model(ids, documents=documents).logits, model(ids).logits) < 1e-13


def test_documents_and_a_cache_are_refused():
    model = Dbrx({"size": "tiny", "d_model": 32, "vocab_size": 61})
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="a cache continues one document"):
        model(ids, model.new_cache(1, 8), documents=pack_documents(ids))
