"""Weights with LLM Foundry's names: from a Composer checkpoint to a model, bit for bit."""

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenyard import add_lora
from tokenyard.testing import ranks
from tokenyard.tolerance import relative_error
from tokenyard_models import Mpt, WeightsError, from_hf
from tokenyard_models.hf import PeftFolder, load_foundry, to_megablocks

from . import foundry_ranks

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


def convert(state, folder, *options, prefix="model.", more=()):
    """Save a state as Composer does, and run the script on it."""
    folder.mkdir(exist_ok=True)
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    content = {"state": {"model": named, "optimizers": {}, "seed": 17, **dict(more)}, "rng": []}
    torch.save(content, folder / "ep0-ba9-rank0.pt")
    return run(folder / "ep0-ba9-rank0.pt", folder / "weights", *options)


def run(checkpoint, out, *options):
    """Run the script in this process; return the folder that it writes."""
    with mock.patch.object(
        sys, "argv", [str(each) for each in (SCRIPT, checkpoint, out, *options)]
    ):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return out


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


@pytest.mark.parametrize("prefix", ["module.model.", "model._fsdp_wrapped_module."])
def test_names_of_wrapped_models(tmp_path, prefix):
    model = model_of()
    other = model_of()
    state = {
        name.replace(".ffn.", "._checkpoint_wrapped_module.ffn."): tensor
        for name, tensor in foundry_state(model).items()
    }
    load_foundry(other, convert(state, tmp_path, prefix=prefix))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("changes", [{}, {"ffn_config": EXPERTS}], ids=["dense", "mb_dmoe"])
def test_a_sharded_checkpoint_over_two_ranks_has_the_same_logits(tmp_path, changes):
    model = model_of(**changes)
    if changes:
        to_megablocks(model, tmp_path / "state")
        state = load_file(tmp_path / "state" / "model.safetensors")
    else:
        state = foundry_state(model)
    state = {name: tensor.detach() for name, tensor in state.items()}
    ranks(2).run(foundry_ranks.save, state, tmp_path / "ep0-ba9", {})
    assert len(list((tmp_path / "ep0-ba9").glob("*.distcp"))) == 2
    other = model_of(**changes)
    load_foundry(other, run(tmp_path / "ep0-ba9", tmp_path / "weights"))
    ids = torch.randint(0, 256, (2, 8))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_dbrx_are_merged(tmp_path, rslora):
    """As LLM Foundry's dbrx-lora-ft trains them: one adapter of queries, keys and values."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from . import hf_models

    if "dbrx" not in hf_models.MODELS:
        pytest.skip("this transformers cannot run DBRX")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(hf_models.dbrx(initializer_range=0.2))
    model.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["Wqkv"], use_rslora=rslora)
    tuned = peft.get_peft_model(model, options).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    state = {name: t.detach() for name, t in tuned.state_dict().items() if "lora_" in name}
    content = {"r": 3, "lora_alpha": 5, "use_rslora": rslora}
    integrations = {"huggingface": {"model": {"peft_config": {"content": content}}}}
    like = ("--like", tmp_path / "base", "--merge")
    folder = convert(state, tmp_path, *like, more={"integrations": integrations})
    ids = torch.randint(0, hf_models.VOCABULARY, (2, 20))
    with torch.no_grad():
        read = from_hf(folder, dtype=torch.float32)
        assert relative_error(read(ids).logits, tuned(ids).logits) < 1e-5


@pytest.mark.parametrize("kind", ["adapters alone", "with the base", "sharded over_two"])
def test_adapters_of_peft_have_the_same_logits(tmp_path, kind):
    """As `hf_causal_lm` with `peft_config` saves them."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from . import hf_models

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(hf_models.qwen3(initializer_range=0.2))
    model.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    tuned = peft.get_peft_model(model, options).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.peft_config["default"].save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    integrations = {"huggingface": {"model": {"peft_config": {"content": written}}}}
    state = {name: t.detach() for name, t in tuned.state_dict().items()}
    if kind != "with the base":
        state = {name: tensor for name, tensor in state.items() if "lora_" in name}
    like = ("--like", tmp_path / "base")
    if kind == "sharded over_two":
        ranks(2).run(foundry_ranks.save, state, tmp_path / "ep0-ba9", integrations)
        folder = run(tmp_path / "ep0-ba9", tmp_path / "weights", *like)
    else:
        folder = convert(state, tmp_path, *like, more={"integrations": integrations})
    adapters = PeftFolder(folder)
    assert adapters.base == (folder / "base" if kind == "with the base" else tmp_path / "base")
    read = from_hf(adapters.base, dtype=torch.float32)
    add_lora(read, adapters.settings, adapters.targets(read))
    adapters.fill(read)
    ids = torch.randint(0, hf_models.VOCABULARY, (2, 20))
    with torch.no_grad():
        assert relative_error(read(ids).logits, tuned(ids).logits) < 1e-5


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


@pytest.mark.parametrize(
    ("out", "options", "sentence"),
    [
        (".", (), "exists already; give the name of a new folder"),
        ("new", ("--like", "."), "has no config.json; give the folder that the run started from"),
        ("new", ("--merge",), "--merge needs --like, the folder of the base"),
        ("new", (), "has no .metadata; give the folder of one checkpoint"),
    ],
)
def test_what_the_script_refuses(tmp_path, monkeypatch, capsys, out, options, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path, out, *options)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("a", {"rank_pattern": {"a": 4}}, r"adapters with rank_pattern \{'a': 4\} are not merged"),
        ("a", {"init_lora_weights": "pissa"}, "adapters with init_lora_weights 'pissa' are not"),
        ("b", {}, r"has no weight for base_model\.model\.b\.lora_A\.weight; give the base"),
    ],
)
def test_adapters_that_cannot_be_merged_write_nothing(tmp_path, name, options, sentence):
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 2)}, like / "model.safetensors")
    state = {
        f"base_model.model.{name}.lora_{side}.default.weight": torch.ones(2, 2) for side in "AB"
    }
    content = {"r": 2, "lora_alpha": 2} | options
    integrations = {"huggingface": {"model": {"peft_config": {"content": content}}}}
    with pytest.raises(SystemExit, match=sentence):
        convert(state, tmp_path, "--like", like, "--merge", more={"integrations": integrations})
    assert not (tmp_path / "weights").exists()


def test_a_checkpoint_without_weights_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert({}, tmp_path, more={"integrations": {"huggingface": None}})
    assert "has no weights of a model" in capsys.readouterr().err
    assert not (tmp_path / "weights").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    folder = convert(foundry_state(model_of()), tmp_path)
    wider = model_of(d_model=32)
    with pytest.raises(WeightsError, match=r"is \[48\], and the model makes it \[96\]"):
        load_foundry(wider, folder)
    with pytest.raises(WeightsError, match=r"lacks transformer\.blocks\.0\.ffn\.experts\.bias"):
        load_foundry(model_of(ffn_config=EXPERTS), folder)
