"""Keys of a config.json that a family does not declare: other tools and versions wrote them.

A key that is known to change what a model computes must have a value that asks for nothing. Keys
that are known to change nothing are dropped. All others are dropped and listed for a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenyard import ConfigError
from tokenyard_models.strict_config import Strict, member_section

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (),
    "alibi": (),
    "attention_bias": (),
    "attention_chunk_size": (),
    "attention_dropout": (0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_pdrop": (0,),
    "bias": (),
    "embd_pdrop": (0,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu",),
    "hidden_dropout": (0,),
    "is_encoder_decoder": (),
    "layer_types": ("full_attention",),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "long_factor": (),
    "mlp_bias": (),
    "mlp_layer_types": ("sparse",),
    "mrope_section": (),
    "n_group": (0, 1),
    "n_shared_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1,),
    "pruned_heads": (),
    "qk_layernorm": (),
    "qkv_bias": (),
    "quantization_config": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (),
    "rope_scaling": (),
    "routed_scaling_factor": (1,),
    "router_logit_softcapping": (),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "short_factor": (),
    "sliding_window": (),
    "sliding_window_size": (-1,),
    "text_config": (),
    "topk_group": (0, 1),
    "use_bias": (),
    "use_qk_norm": (),
    "use_sliding_window": (),
    "vision_config": (),
}
"""Keys that change what a model computes, with the values that do not. null and false never do."""

_TOOLS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_experts_implementation",
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    ]
)
"""Keys of other tools, of other versions and of generation, which change nothing."""


def without_foreign(
    section: type[Strict], data: Mapping[str, Any], where: str, unknown: list[str]
) -> dict[str, Any]:
    """Return the keys of `data` that a section declares or ignores, at any depth.

    Appends the paths of unknown keys to `unknown`. Raises ConfigError for a key that changes what
    the model computes.
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}"
        if key in section.model_fields:
            member = member_section(section, key, value)
            kept[key] = value if member is None else without_foreign(member, value, path, unknown)
        elif key in _NEUTRAL:
            _check_neutral(path, value, _NEUTRAL[key])
        elif key not in section.ignored and key not in _TOOLS:
            unknown.append(path)
    return kept


def _check_neutral(path: str, value: Any, neutral: tuple[Any, ...]) -> None:
    values = value if isinstance(value, list) else [value]
    if not value and value in (None, False, {}, "", *neutral, []):
        return
    if all(each in neutral for each in values):
        return
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    allowed = " or ".join(repr(each) for each in (*neutral, None))
    raise ConfigError(
        f"{path} is {shown}, which changes what the model computes and is not supported; "
        f"use weights for which it is {allowed}"
    )
