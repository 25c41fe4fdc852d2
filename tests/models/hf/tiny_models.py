"""A tiny model of every family of the installed transformers that has experts."""

import importlib
import inspect
import os
import pkgutil
import re
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import models as hf_models_package

_EXPERTS = re.compile(r"^class (\w*Experts\w*)\(", re.M)
_COUNTS_EXPERTS = re.compile(r"config\.\w*experts\b")
_ENDS = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model", "Backbone", "")
"""The class that is taken of a family: the first that has experts, in this order."""

_AS_IT_IS = 1 << 30
_SIZES = (
    (r"vocab_size", 67),
    (r"num_(hidden_)?layers$|n_layers?$|^depth|(de|en)coder_layers", 2),
    (r"(key_value|kv)_heads|kv_n_heads|num_(query_)?groups$", 2),
    (r"^index_|head_dim|_head_size|nope_head|v_head", _AS_IT_IS),
    (r"heads", 2),
    (r"per_tok|top_?k(_experts)?$|^moe_k$|moe_top|num_selected", 2),
    (r"num_expert_group|n_group|topk_group|dense", 1),
    (r"sparse_step|layer_freq|_interval|_period", 1),
    (r"^moe_layer_start_index", 1),
    (r"experts$", 4),
    (r"lora_rank|_rank$", 8),
    (r"(intermediate|ffn|ff|inner|mlp).*(size|dim)|mlp_dim|d_ff", 16),
    (r"(hidden|embed|channels|model).*(size|dim)|d_model|width|n_embd", 128),
    (r"max_position|max_seq|n_positions", 128),
)
"""The largest value of a key, by the first pattern that its name holds."""

_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4}
_GEMMA = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_KEYS = {
    "beam": _SPARSE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
        | {"hidden_size": 128},
    },
    "deepseek_ocr2_text": _SPARSE | _ROUTED,
    "deepseek_v2": _ROUTED,
    "diffusion_gemma_text": _GEMMA,
    "dots1": _ROUTED | {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": _GEMMA | {"enable_moe_block": True},
    "glm4v_moe_text": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "glm5_next_text": _SPARSE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"head_dim": 64},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2}
    | {"expert_layer_offset": 0, "expert_layer_period": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    "nllb-moe": {"encoder_sparse_step": 1},
    "step3p5": _SPARSE | {"sliding_window": 4},
    "vitpose_backbone": {"num_experts": 4, "part_features": 8},
}
"""Keys by `model_type`: those that have no default, or where the default leaves out the experts."""


def families():
    """Return {module: names of its classes of experts} of every file that builds experts."""
    found = {}
    for package in pkgutil.iter_modules(hf_models_package.__path__):
        folder = Path(hf_models_package.__path__[0]) / package.name
        for path in sorted(folder.glob("modeling_*.py")):
            code = path.read_text(encoding="utf-8")
            names = _EXPERTS.findall(code)
            if names or _COUNTS_EXPERTS.search(code):
                found[f"{package.name}.{path.stem}"] = names
    return found


def tiny_model(module, names, **options):
    """Return a model of a family with experts in it, with weights that the logits depend on."""
    for cls in _classes(importlib.import_module(f"transformers.models.{module}")):
        torch.manual_seed(0)
        model = cls._from_config(cls.config_class(**_keys(cls.config_class)), **options).eval()
        experts = experts_of(model, names)
        if not (experts or not names):
            continue
        with torch.no_grad():
            for parameter in (p for module in experts for p in module.parameters()):
                parameter.normal_(std=0.3)
        return model
    raise AssertionError(f"no class of {module} has {' or '.join(names)} in it")


def experts_of(model, names):
    """Return the modules of the named classes, and of classes that stand in their place."""
    return [
        module
        for module in model.modules()
        if {cls.__name__ for cls in type(module).__mro__} & set(names)
    ]


def inputs(model):
    """Return tokens [2, 5], or an image, as keyword arguments."""
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        return {"pixel_values": torch.ones(2, 3, 256, 192), "dataset_index": torch.tensor([0, 1])}
    ids = torch.arange(1, 11).view(2, 5)
    every = {"decoder_input_ids": ids, "use_cache": False}
    return {"input_ids": ids} | {name: every[name] for name in every if name in names}


def logits(model):
    """Return the logits, or the first tensor that the model returns."""
    outputs = model(**inputs(model))
    first = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return first if isinstance(first, torch.Tensor) else first[0]


def _classes(module):
    """Return the classes of models that a module defines."""
    members = [cls for cls in vars(module).values() if inspect.isclass(cls)]
    classes = [
        cls
        for cls in members
        if issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and not cls.__name__.endswith("PreTrainedModel")
    ]
    return sorted(
        classes, key=lambda cls: [cls.__name__.endswith(end) for end in _ENDS].index(True)
    )


def _keys(config_class):
    """Return arguments of a config class that make its defaults small."""
    keys = {}
    for name, value in vars(config_class()).items():
        if isinstance(value, PreTrainedConfig):
            keys[name] = _keys(type(value))
        elif not name.startswith("_") and (small := _small(name, value)) != value:
            keys[name] = small
    return keys | _KEYS.get(config_class.model_type, {})


def _small(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name.endswith(("token_id", "token_index")):
        return min(value, 3)
    sizes = (size for pattern, size in _SIZES if re.search(pattern, name))
    return min(value, next(sizes, value))
