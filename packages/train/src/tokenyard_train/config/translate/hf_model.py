"""Translate `hf_causal_lm`: a model that a Hugging Face folder describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenyard import ConfigError
from tokenyard_models.hf import DescribedModel, WeightsError, described_model
from tokenyard_models.strict_config import Strict, merged, only, parse, without_ignored
from tokenyard_train.config.from_hf import section_with_length
from tokenyard_train.config.translate.change import Change
from tokenyard_train.config.translate.hub import cached_folder, is_hub_name
from tokenyard_train.config.translate.layout import AnyCase
from tokenyard_train.data.paths import HF

_NAME = "hf_causal_lm"
_PATH = "model.pretrained_model_name_or_path"
_SECTIONS = ("attn_config", "ffn_config", "init_config", "peft_config")
_SCRATCH = "model: {name: mpt_causal_lm, d_model: ..., n_heads: ..., n_layers: ...}"


class PeftConfig(Strict):
    """PEFT's options of LoRA."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ("base_model_name_or_path", "inference_mode", "task_type")
    )

    peft_type: Annotated[Literal["LORA"], AnyCase] = "LORA"
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(min_length=1)
    use_rslora: bool = False
    bias: Annotated[str, only("none", "training biases")] = "none"
    use_dora: Annotated[bool, only(False, "DoRA")] = False
    init_lora_weights: Annotated[bool, only(True, "another initialisation of LoRA")] = True


class HfCausalLm(Strict):
    """LLM Foundry's options of a Hugging Face model."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        (
            "additional_eval_metrics",
            "additional_train_metrics",
            "allow_embedding_resizing",
            "attn_implementation",
            "init_device",
            "should_save_peft_only",
            "trust_remote_code",
            "use_auth_token",
            "use_flash_attention_2",
            "use_logits",
            "use_train_metrics",
        )
    )

    name: Literal["hf_causal_lm"]
    pretrained_model_name_or_path: str
    pretrained: bool = True
    config_overrides: dict[str, Any] = {}
    peft_config: PeftConfig | None = None
    load_in_8bit: Annotated[bool, only(False, "training weights of 8 bits")] = False
    shift_labels: Annotated[bool, only(False, "shifting labels twice")] = False


def translate_model(
    config: Mapping[str, Any], changes: list[Change], ignored: list[str]
) -> dict[str, Any]:
    """Return a config with the model of a Hugging Face folder in place of `hf_causal_lm`.

    A pretrained model becomes `load_path: hf://folder`. Raises ConfigError for a name that is no
    folder and not in the local cache, and for an architecture that is unknown here.
    """
    section = config.get("model")
    if not isinstance(section, Mapping):
        return dict(config)
    if section.get("name") != _NAME:
        blank = {key for key in _SECTIONS if section.get(key, ...) is None}
        return {**config, "model": {k: v for k, v in section.items() if k not in blank}}
    kept = without_ignored(HfCausalLm, section, "model", ignored)
    given = parse(HfCausalLm, {k: v for k, v in kept.items() if v is not None}, "model")
    folder = _folder(given.pretrained_model_name_or_path)
    model = _described(folder, given)
    overrides = _overrides(given.config_overrides, model.renamed, changes)
    read = dict(config)
    for key in ("name", "pretrained"):
        changes.append(Change(f"model.{key}", f"left out; see {_PATH}", told=False))
    if given.pretrained and read.get("load_path") is None:
        changes.append(Change(_PATH, f"load_path: {HF}{folder}"))
        read |= {"load_path": f"{HF}{folder}", "model": overrides}
    else:
        changes.append(Change(_PATH, f"the keys of {folder / 'config.json'}"))
        section = section_with_length(model.section)
        read["model"] = {"name": model.name} | merged(section, overrides)
    if given.peft_config is not None:
        read["lora"] = _lora(given.peft_config, model.modules, changes)
    return read


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    cached = folder if folder.is_dir() else cached_folder(name)
    if cached is None:
        download = f"download it (hf download {name}), or " if is_hub_name(name) else ""
        raise ConfigError(
            f"{_PATH} is {name!r}, which is no folder here and not in the local Hugging Face "
            f"cache; {download}give the path of its folder"
        )
    return cached


def _described(folder: Path, given: HfCausalLm) -> DescribedModel:
    """Return what a folder says of its model. Raises ConfigError for one that is unknown here."""
    try:
        return described_model(folder)
    except WeightsError as error:
        instead = "" if given.pretrained else f", or train one from random weights: {_SCRATCH}"
        name = given.pretrained_model_name_or_path
        raise ConfigError(f"{_PATH} is {name!r}, and {error}{instead}") from None


def _overrides(
    given: Mapping[str, Any], renamed: Mapping[str, str], changes: list[Change]
) -> dict[str, Any]:
    """Return `config_overrides` in the names of the model's section."""
    overrides = {renamed.get(key, key): value for key, value in given.items()}
    if overrides:
        changes.append(Change("model.config_overrides", "keys of model", told=False))
    attention = overrides.get("attn_config")
    if isinstance(attention, Mapping):
        # attn_impl chooses a kernel, and packed documents are apart in any case
        left_out = {"attn_impl"}
        if not attention.get("attn_uses_sequence_id"):
            left_out.add("attn_uses_sequence_id")
        overrides["attn_config"] = {k: v for k, v in attention.items() if k not in left_out}
        if not overrides["attn_config"]:
            del overrides["attn_config"]
        key = "model.config_overrides.attn_config"
        changes.append(Change(key, f"without {' and '.join(sorted(left_out & set(attention)))}"))
    return overrides


def _lora(
    given: PeftConfig, modules: Mapping[str, tuple[str, ...]], changes: list[Change]
) -> dict[str, Any]:
    """Return the section `lora` that PEFT's options describe."""
    lora: dict[str, Any] = {
        "rank": given.r,
        "alpha": given.lora_alpha,
        "dropout": given.lora_dropout,
        "use_rslora": given.use_rslora,
    }
    if given.target_modules != "all-linear":
        wanted = given.target_modules
        lora["targets"] = _targets([wanted] if isinstance(wanted, str) else wanted, modules)
    split = any("qkv" in target and len(modules[target]) == 1 for target in lora.get("targets", ()))
    note = "lora; queries, keys and values have an adapter each" if split else "lora"
    changes.append(Change("model.peft_config", note))
    return lora


def _targets(wanted: list[str], modules: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the name patterns of the weights that consist of the wanted modules.

    Raises ConfigError for a module that is in none, and for a part of a fused weight.
    """
    used: set[str] = set()
    targets = []
    for pattern, parts in modules.items():
        names = {part: [m for m in wanted if f".{part}".endswith(f".{m}")] for part in parts}
        named = {name for found in names.values() for name in found}
        missing = [part for part, found in names.items() if not found]
        if named and missing:
            raise ConfigError(
                f"model.peft_config.target_modules has {', '.join(sorted(named))}, which is in one "
                f"weight with {missing[0].rpartition('.')[2]} here; name all parts of that weight"
            )
        if named:
            used |= named
            targets.append(pattern)
    if unknown := [name for name in wanted if name not in used]:
        raise ConfigError(
            f"model.peft_config.target_modules has {unknown[0]!r}, which is no linear layer of "
            "the model; name those of its Hugging Face folder, or say all-linear"
        )
    return targets
