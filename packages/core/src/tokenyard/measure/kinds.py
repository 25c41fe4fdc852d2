"""The kinds of work that GPU kernels and CPU operators do, by their names."""

from __future__ import annotations

import re

KINDS = ("matmuls", "attention", "elementwise", "routing", "copies", "optimizer", "collectives")
"""Kinds of work on a device. Elementwise includes norms, softmax and other reductions."""

_PATTERNS = (
    ("elementwise", r"^triton_(poi|red|per)_"),  # inductor; the rest of the name is what it fused
    ("collectives", r"nccl|c10d|gloo|^(publish|pull)_"),
    ("optimizer", r"adam|multi_tensor_apply|aten::_(foreach|fused)_"),
    ("optimizer", r"^(nesterov|descend|symmetric_product|scale_matrices)"),  # of Muon
    ("attention", r"flash|fmha|attention|sdpa"),
    ("host", r"^autograd::|backward\d+$"),
    # Our kernels are named by their functions
    ("routing", r"sort|topk|search|cub::|cumsum|::(plan|route|weigh)|(select|weigh)_experts"),
    ("routing", r"^(route|bound_ids|list_tiles|count_|add_up_blocks|place_slots|plan_at_once)"),
    ("matmuls", r"gemm|gemv|nvjet|xmma|cutlass|splitk|triton_tem_|grouped_mm|_?experts|::logits"),
    ("matmuls", r"^logits_(backward_)?of_few"),
    (
        "matmuls",
        r"^(up_and_activate|times_weight|weight_gradient|differentiate_down|\w+_times_dense)|low_rank",
    ),
    ("matmuls", r"aten::(mm|addmm|bmm|baddbmm|mv|dot|linear|matmul)$"),
    ("elementwise", r"^(sum|(de)?quantize|dot_with)_(rows|weights)|^(un)?pack_row"),
    ("copies", r"copy|clone|gather|scatter|index|embedding|_rows|to_tokens|clear_tail"),
    (
        "copies",
        r"^mem(cpy|set)|fillfunctor|aten::(cat|stack|to|fill_|zero_|repeat)$|nyard.*permute",
    ),
    ("host", r"aten::\w*(empty|zeros|view|reshape|as_strided|expand|transpose|permute|slice)\w*$"),
    ("host", r"aten::(t|select|split\w*|chunk|narrow|detach|alias|(un)?squeeze|unflatten|item)$"),
    ("elementwise", r"elementwise|reduce|norm|softmax|at::native|^\w+::\w+$"),
    ("elementwise", r"^(cross_entropy|differentiate|split_in_two|sum_dots|bias_dots)"),
)
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


def kind_of(name: str) -> str:
    """Return the kind of a GPU kernel, or of a CPU operator such as ``aten::mm``.

    It is one of `KINDS`, "host" for calls that compute and move no numbers, or "other".
    """
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")
