"""Every reader of weights names a tensor that is missing, left over or of another kind."""

import json
import re
import tracemalloc
from functools import partial

import pytest
import torch
from hf_models import MODELS, made
from safetensors.torch import load_file, save_file

from tokenyard import ConfigError
from tokenyard_models import Upcycling, WeightsError, from_hf, to_hf, upcycle
from tokenyard_models.hf import Folder, load_weights, model_section
from tokenyard_models.hf._folder_map import formats

FUSED = [name for name, hf_format in formats().items() if hf_format.fused]
FOLDERS = [*((name, False) for name in formats()), *((name, True) for name in FUSED)]
DENSE = [name for name, hf_format in formats().items() if hf_format.upcycled]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder of each form, written once, and its model."""
    folders = {}

    def write(name, fused):
        if (name, fused) not in folders:
            root = tmp_path_factory.mktemp("written")
            made(MODELS[name]).save_pretrained(root / "theirs")
            model = from_hf(root / "theirs")
            to_hf(model, root / "ours", fused=fused)
            folders[name, fused] = (root / "ours", model)
        return folders[name, fused]

    return write


def copied(folder, target, change):
    """Copy a folder and change its tensors; return the copy and what `change` returns."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    result = change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target, result


def missing(tensors, key):
    del tensors[key]
    return f"lacks {re.escape(key)}$"


def extra(tensors, key):
    tensors[key + "_extra"] = torch.zeros(2)
    return f"holds {re.escape(key)}_extra, which the model has no use for"


def renamed(tensors, key):
    tensors[key + "s"] = tensors.pop(key)
    return f"lacks {re.escape(key)}$"


def wrong_shape(tensors, key):
    tensors[key] = tensors[key][1:].contiguous()
    return rf"{re.escape(key)} in \S+ is \[[\d, ]+\], and config\.json makes it \[[\d, ]+\]"


def wrong_dtype(tensors, key):
    tensors[key] = tensors[key].to(torch.int8)
    return f"{re.escape(key)} in .* is I8; weights are read in F64"


DAMAGES = (missing, extra, renamed, wrong_shape, wrong_dtype)


def read_new(folder, model, target):
    from_hf(folder)


def read_into(folder, model, target):
    load_weights(model, Folder(folder))


def read_to_upcycle(folder, model, target):
    upcycle(folder, target, Upcycling(2, 1))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("reader", [read_new, read_into], ids=["from_hf", "load_weights"])
@pytest.mark.parametrize(("name", "fused"), FOLDERS)
def test_a_damaged_tensor_is_named(written, tmp_path, name, fused, reader, damage):
    """Damage the first and the last tensor by name, and the final norm."""
    folder, model = written(name, fused)
    check_damages(folder, model, tmp_path, reader, damage)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", DENSE)
def test_upcycling_names_a_damaged_tensor(written, tmp_path, name, damage):
    folder, model = written(name, False)
    check_damages(folder, model, tmp_path, read_to_upcycle, damage)
    assert not (tmp_path / "target").exists()


def check_damages(folder, model, tmp_path, reader, damage):
    before = [p.clone() for p in model.parameters()]
    keys = sorted(load_file(folder / "model.safetensors"))
    norm = next(key for key in keys if key.endswith(("model.norm.weight", "norm_f.weight")))
    for number, key in enumerate({keys[0], keys[-1], norm, keys[len(keys) // 2]}):
        changed, sentence = copied(folder, tmp_path / f"damaged{number}", partial(damage, key=key))
        with pytest.raises(WeightsError, match=sentence) as raised:
            reader(changed, model, tmp_path / "target")
        assert "\n" not in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


SIZES = {
    "dbrx": ("d_model", "n_layers", "vocab_size"),
    "mixtral": ("num_local_experts", "head_dim"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}
CLAIM = r"config\.json (makes it|has)|make a tensor of \S+ numbers; at most|more than 64 bits"
LLAMA_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


@pytest.mark.parametrize("size", [100, 10**9, 10**12, 2**63, 10**30])
@pytest.mark.parametrize("name", formats())
def test_sizes_are_compared_before_memory_is_taken(written, tmp_path, name, size):
    folder, _ = written(name, False)
    target, _ = copied(folder, tmp_path / "claims", lambda tensors: None)
    keys = json.loads((folder / "config.json").read_text())
    for key in (*SIZES.get(name, ()), *(LLAMA_SIZES if name != "dbrx" else ())):
        if name == "qwen3_moe" and key == "intermediate_size":
            continue  # of dense layers, and there are none
        heads = keys.get("num_attention_heads") or keys["n_heads"]
        claim = size - size % (2 * heads)
        (target / "config.json").write_text(json.dumps(keys | {key: claim}))
        tracemalloc.start()
        with pytest.raises((WeightsError, ConfigError), match=CLAIM) as raised:
            from_hf(target)
        assert "\n" not in str(raised.value)
        if raised.type is WeightsError:  # else the model is refused where it is built
            with pytest.raises(WeightsError, match=CLAIM):
                model_section(Folder(target))
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
