"""Weights with LLM Foundry's names: from a Composer checkpoint to a model, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenyard_models import Mpt, WeightsError
from tokenyard_models.hf import load_foundry, to_megablocks

SCRIPT = Path(__file__).parents[3] / "examples" / "composer_to_safetensors.py"
SIZES = {"size": "tiny", "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 8}
GLU = {"ffn_type": "mptglu", "ffn_hidden_size": 24}
EXPERTS = {"ffn_type": "mb_dmoe", "moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 20}
MODULES = {
    "embed": "wte",
    "positions": "wpe",
    "norm": "norm_f",
    "norm_1": "norm_1",
    "norm_2": "norm_2",
    "attention.qkv": "attn.Wqkv",
    "attention.out": "attn.out_proj",
}


def model_of(**changes):
    """A model whose parameters are all random."""
    model = Mpt(SIZES | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def foundry_state(model):
    """A dense model's tensors under LLM Foundry's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        block, rest = "transformer.", name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            block = f"transformer.blocks.{layer}."
        kind = "bias" if rest.endswith("bias") else "weight"
        if rest.startswith("ffn.up") and rest.removeprefix("ffn.up") in ("", "_bias"):
            gated = tensor.shape[0] == 48
            for part, value in zip(("gate_proj", "up_proj")[not gated :], tensor.chunk(1 + gated)):
                state[f"{block}ffn.{part}.{kind}"] = value
        elif rest.startswith("ffn.down"):
            state[f"{block}ffn.down_proj.{kind}"] = tensor
        else:
            state[f"{block}{MODULES[rest.rpartition('.')[0]]}.{kind}"] = tensor
    return state


def convert(state, folder, *options, prefix="model."):
    """Save a state as Composer does, and run the script on it."""
    folder.mkdir(exist_ok=True)
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    content = {"state": {"model": named, "optimizers": {}, "seed": 17}, "rng": []}
    torch.save(content, folder / "ep0-ba9-rank0.pt")
    command = [sys.executable, SCRIPT, folder / "ep0-ba9-rank0.pt", folder / "weights", *options]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "weights"


@pytest.mark.parametrize(
    "changes",
    [{}, {"ffn_config": GLU}, {"ffn_config": GLU, "no_bias": True}],
    ids=["plain", "gated with biases", "gated"],
)
def test_a_dense_composer_checkpoint_becomes_the_model(tmp_path, changes):
    model = model_of(**changes)
    other = model_of(**changes)
    load_foundry(other, convert(foundry_state(model), tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", ["mb_dmoe", "mb_moe"])
def test_experts_of_megablocks_load_and_save_bit_for_bit(tmp_path, kind):
    changes = {"ffn_config": EXPERTS | {"ffn_type": kind}}
    model = model_of(**changes)
    other = model_of(**changes)
    to_megablocks(model, tmp_path / "first")
    state = load_file(tmp_path / "first" / "model.safetensors")
    load_foundry(other, convert(state, tmp_path))
    to_megablocks(other, tmp_path / "second")
    again = load_file(tmp_path / "second" / "model.safetensors")
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_the_script_brings_the_files_of_a_hugging_face_folder(tmp_path):
    like = tmp_path / "like"
    like.mkdir()
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin"):
        (like / name).write_text("{}")
    out = convert({"lm_head.weight": torch.ones(2)}, tmp_path / "run", "--like", like)
    names = {file.name for file in out.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}


def test_weights_of_another_model_are_refused(tmp_path):
    folder = convert(foundry_state(model_of()), tmp_path)
    wider = model_of(d_model=32)
    with pytest.raises(WeightsError, match=r"is \[48\], and the model makes it \[96\]"):
        load_foundry(wider, folder)
    with pytest.raises(WeightsError, match=r"lacks transformer\.blocks\.0\.ffn\.experts\.bias"):
        load_foundry(model_of(ffn_config=EXPERTS), folder)
