"""Causal attention within each document of packed rows.

| device and dtype | computed by |
|---|---|
| a GPU of capability 8.0, 16 bits | ``torch.nn.attention.varlen``, which is flash attention |
| another GPU, dtype or head size; compiled code on a CPU | SDPA with a mask [B, 1, S, S] |
| a CPU | SDPA, one document after another |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenyard import Documents

_HALF = (torch.bfloat16, torch.float16)
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM = 256


def attend_within_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Return causal attention [B, heads, S, head_dim] of each document to itself.

    q is [B, heads, S, head_dim]; k and v are [B, kv_heads, S, head_dim]. Padding attends to padding
    of its row: its result is finite, and no document depends on it.
    """
    if q.is_cuda and _has_flash(q):
        return _by_flash(q, k, v, documents)
    if q.is_cuda or torch.compiler.is_compiling():  # compiled code depends on no lengths
        return _masked(q, k, v, documents)
    return _one_by_one(q, k, v, documents)


def _has_flash(q: Tensor) -> bool:
    head_dim = q.shape[-1]
    return (
        q.dtype in _HALF
        and head_dim % 8 == 0
        and head_dim <= _FLASH_HEAD_DIM
        and torch.cuda.get_device_capability(q.device) >= _FLASH_CAPABILITY
    )


def _by_flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    # Imported here: it imports the compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    rows = q.shape[0]
    causal: dict[str, Any] = {"is_causal": True}
    keywords = varlen_attn.__kwdefaults__ or {}  # they differ between versions of torch
    if "window_size" in keywords:
        causal = {"window_size": (-1, 0)}
    if "enable_gqa" in keywords:
        causal["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [B * S, heads, head_dim]
    lengths = (documents.offsets, documents.offsets, documents.longest, documents.longest)
    attend: Any = varlen_attn
    y = attend(*packed, *lengths, **causal)
    result: Tensor = y.unflatten(0, (rows, -1)).transpose(1, 2)
    return result


def _masked(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    ids = documents.ids
    same = ids.unsqueeze(2) == ids.unsqueeze(1)  # [B, S, S]
    mask = same.tril().unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    rows = q.shape[0]
    gqa = q.shape[1] != k.shape[1]
    sizes = documents.offsets.diff()
    lengths = sizes[sizes > 0].tolist()
    # one split of all tokens: its backward pass writes each gradient once
    pieces = [x.transpose(0, 1).flatten(1, 2).unsqueeze(0).split(lengths, 2) for x in (q, k, v)]
    results = [
        F.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=gqa)
        for q1, k1, v1 in zip(*pieces)  # [1, heads, tokens, head_dim]
    ]
    return torch.cat(results, 2).squeeze(0).unflatten(1, (rows, -1)).transpose(0, 1)
