"""Copy the weights of a Composer or LLM Foundry checkpoint into safetensors files.

Run it where the checkpoint was made, and only on checkpoints that you trust: they are pickles, and
reading a pickle can run code. It needs torch and safetensors, and for objects in a .pt file also
what wrote them. Optimizer states are left out.

    python composer_to_safetensors.py ep0-ba4800-rank0.pt weights
    python composer_to_safetensors.py checkpoints/ep0-ba4800 weights
    python composer_to_safetensors.py ep0-ba4800-rank0.pt weights --like hugging-face-folder

CHECKPOINT is a .pt file, or the folder of a sharded checkpoint. The folder that is written is used
as `load_path: weights`; with --like, which copies config.json and the tokenizer from the folder
that the run started from, as `load_path: hf://weights`.

Adapters of a run with `peft_config` become a folder of PEFT, which is used as `load_path: weights`.
Their base is the folder --like; if the checkpoint holds the base's weights, it is weights/base.
With --merge, the adapters are added to the weights of --like, which is used as a model is.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja")
WRAPPERS = re.compile(r"^module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
NOT_SET = (None, False, [], {})
MERGED = {
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian"),  # others change the base
    **dict.fromkeys(("alpha_pattern", "rank_pattern", "modules_to_save"), NOT_SET),
    **dict.fromkeys(("fan_in_fan_out", "layer_replication", "lora_bias", "use_dora"), NOT_SET),
}
PEFT_OPTIONS = ("integrations", "huggingface", "model", "peft_config", "content")


def read_file(checkpoint: Path) -> tuple[dict, dict]:
    """Return the model's state of a .pt file, and PEFT's options, {} without adapters."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    state = content.get("state", {"model": content})
    options = state
    for key in PEFT_OPTIONS:
        options = options.get(key) or {}
    return state["model"], options


def read_folder(checkpoint: Path) -> tuple[dict, dict]:
    """Return the same of a sharded checkpoint. Optimizer states are not read."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(checkpoint)
    state = {"state.model.": {}, ".".join(("state", *PEFT_OPTIONS, "")): {}}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        value = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor(entry) else None
        for prefix, members in state.items():
            if key.startswith(prefix):
                members[key] = value
    for members in state.values():
        load(members, storage_reader=reader, no_dist=True)
    return tuple(
        {key.removeprefix(prefix): value for key, value in members.items()}
        for prefix, members in state.items()
    )


def is_tensor(entry: object) -> bool:
    """Return whether an entry of a sharded checkpoint is a tensor, not an object."""
    return hasattr(entry, "properties")


def weights(state: dict) -> dict[str, torch.Tensor]:
    """Return the model's tensors, under the names of the model inside Composer's."""
    names = {name: WRAPPERS.sub("", name).removeprefix("model.") for name in state}
    tensors = {new: state[old] for old, new in names.items() if torch.is_tensor(state[old])}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def split(tensors: dict) -> tuple[dict, dict]:
    """Return the tensors of adapters, and those of their base, each under its own names."""
    adapters = {
        re.sub(r"\.(lora_\w+)\.default", r".\1", name): tensor
        for name, tensor in tensors.items()
        if ".lora_" in name
    }
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }
    return adapters, base


def write(tensors: dict, out: Path, like: Path | None) -> None:
    """Write tensors, with config.json and the tokenizer of the folder `like`."""
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if like:
        copy(like, out, "config.json", *TOKENIZER)


def copy(source: Path, target: Path, *patterns: str) -> None:
    """Copy files from one folder to another."""
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copy(file, target)


def write_adapters(tensors: dict, options: dict, out: Path, like: Path | None) -> None:
    """Write a folder of PEFT, and the base in it if the tensors have it."""
    adapters, base = split(tensors)
    out.mkdir(parents=True)
    if base:
        write(base, out / "base", like)
    folder = out / "base" if base else like
    if folder is not None:
        options = {**options, "base_model_name_or_path": str(folder.resolve())}
    save_file(adapters, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(options, indent=2))


def check_merges(adapters: dict, options: dict, like: Path) -> None:
    """End the program, before anything is written, if adapters cannot be added to weights."""
    for key, values in MERGED.items():
        if options.get(key) not in values:
            raise SystemExit(f"adapters with {key} {options[key]!r} are not merged; omit --merge")
    names = set()
    for file in like.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names.update(weights.keys())
    for name in sorted(adapters):
        place = re.fullmatch(r"base_model\.model\.(.*)\.lora_[AB]\.weight", name)
        if place is None or names.isdisjoint((place[1], f"{place[1]}.weight")):
            raise SystemExit(f"{like} has no weight for {name}; give the base of the adapters")


def write_merged(tensors: dict, options: dict, out: Path, like: Path) -> None:
    """Write the weights of the folder `like`, file by file, with the adapters added to them."""
    adapters, _ = split(tensors)
    check_merges(adapters, options, like)
    root = options["r"] ** (0.5 if options.get("use_rslora") else 1)
    out.mkdir(parents=True)
    for file in sorted(like.glob("*.safetensors")):
        weights = load_file(file)
        for name, weight in weights.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in adapters:
                a, b = (adapters.pop(f"{key}{side}.weight").float() for side in "AB")
                whole = weight.add(b @ a, alpha=options["lora_alpha"] / root)
                weights[name] = whole.to(weight.dtype)
        save_file(weights, out / file.name, {"format": "pt"})
    copy(like, out, "config.json", "*.index.json", *TOKENIZER)


def main() -> None:
    """Convert the checkpoint of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--like", type=Path, help="Hugging Face folder of the same model")
    parser.add_argument("--merge", action="store_true", help="add adapters to the base --like")
    given = parser.parse_args()
    if given.merge and not given.like:
        parser.error("--merge needs --like, the folder of the base")
    if given.out.exists():
        parser.error(f"{given.out} exists already; give the name of a new folder")
    if given.like and not (given.like / "config.json").is_file():
        parser.error(f"{given.like} has no config.json; give the folder that the run started from")
    if not given.checkpoint.exists():
        parser.error(f"{given.checkpoint} does not exist; give a .pt file, or a folder of one")
    if given.checkpoint.is_dir() and not (given.checkpoint / ".metadata").is_file():
        parser.error(f"{given.checkpoint} has no .metadata; give the folder of one checkpoint")
    state, peft = (read_folder if given.checkpoint.is_dir() else read_file)(given.checkpoint)
    tensors = weights(state)
    adapted = any(".lora_" in name for name in tensors)
    if not tensors:
        parser.error(f"{given.checkpoint} has no weights of a model")
    if adapted and not peft:
        parser.error(f"{given.checkpoint} has adapters without their options; save them by PEFT")
    if adapted:
        (write_merged if given.merge else write_adapters)(tensors, peft, given.out, given.like)
    else:
        write(tensors, given.out, given.like)
    print(f"{len(tensors)} tensors in {given.out}")


if __name__ == "__main__":
    main()
