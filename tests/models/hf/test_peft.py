"""Adapters are read and written as PEFT does, and have the same logits and gradients there."""

import json
import re
import shutil

import pytest
import torch

from . import hf_models

pytest.importorskip("peft", minversion="0.21")

import peft
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from tokenyard import LoraSettings, Routing, add_lora
from tokenyard.lora import adapters
from tokenyard.tolerance import relative_error
from tokenyard_models import WeightsError, from_hf
from tokenyard_models.families.dbrx import Dbrx
from tokenyard_models.hf import PeftFolder, is_peft, to_peft

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "qwen3")


def saved(name, tmp_path):
    """Save a small model of a family; return the folder."""
    torch.manual_seed(3)
    config = getattr(hf_models, name)(initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def by_peft(base, dtype=torch.float32, **options):
    """Load a model by transformers, with adapters of PEFT whose B is not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation="eager")
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5} | options))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned


def read(base, folder, dtype=torch.float32):
    """Load the base, and add the adapters of PEFT's folder."""
    model = from_hf(base, dtype=dtype)
    adapted = PeftFolder(folder)
    add_lora(model, adapted.settings, adapted.targets(model))
    adapted.fill(model)
    return model


def ids():
    return torch.randint(0, hf_models.VOCABULARY, (2, 20), generator=torch.Generator())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "target_parameters": EXPERTS[1:]},
        {"target_modules": ["model.layers.1.self_attn.o_proj"], "lora_dropout": 0.1},
        {"target_modules": [], "target_parameters": EXPERTS[:1]},
    ],
    ids=["all", "head", "one layer", "experts"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_adapters_of_peft_are_read(name, options, tmp_path):
    base = saved(name, tmp_path)
    tuned = by_peft(base, **options).eval()
    tuned.save_pretrained(tmp_path / "adapters")
    assert is_peft(tmp_path / "adapters")
    model = read(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        want = tuned(ids()).logits
        assert relative_error(model(ids()).logits, want) < 1e-5
    to_peft(model, tmp_path / "again", base=str(base))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    original = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    for key, tensor in again.items():  # of a fused weight, all parts are written
        assert torch.equal(tensor, original.get(key, torch.zeros_like(tensor)))
    assert again.keys() >= {key for key in original if "lora" in key}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"layers.1.self_attn.q_proj": 9, "k_proj": 2},
            "alpha_pattern": {"v_proj": 3, "k_proj": 7.5},
            "use_rslora": True,
        },
    ],
    ids=["gate_proj", "patterns"],
)
def test_ranks_of_several_sizes_are_read(options, tmp_path):
    """PEFT makes one adapter of twice the rank of gate_proj and up_proj of experts."""
    base = saved("qwen3_moe", tmp_path)
    tuned = by_peft(base, **options).eval()
    tuned.save_pretrained(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    model = read(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        want = tuned(ids()).logits
        assert relative_error(model(ids()).logits, want) < 1e-5
        to_peft(model, tmp_path / "again", base=str(base))
        again = peft.AutoPeftModelForCausalLM.from_pretrained(
            tmp_path / "again", experts_implementation="eager"
        )
        assert relative_error(again(ids()).logits, want) < 1e-5


@pytest.mark.parametrize("targets", ["*", "all-linear", ["experts.*"], ["blocks.1.*"]], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_is_written(name, targets, tmp_path):
    if name == "qwen3" and targets == ["experts.*"]:
        pytest.skip("a dense model")
    base = saved(name, tmp_path)
    model = from_hf(base)
    add_lora(model, LoraSettings(4, 6.0), targets)
    for parameter in (p for n, p in model.named_parameters() if ".adapter." in n):
        torch.nn.init.normal_(parameter, std=0.3)
    count = to_peft(model, tmp_path / "adapters", base=str(base))
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # grouped_mm, the default on a CPU, takes no odd widths
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapters", experts_implementation="eager"
    )
    with torch.no_grad():
        want = model(ids()).logits
        assert relative_error(tuned(ids()).logits, want) < 1e-5
        merged = tuned.merge_and_unload()
        assert relative_error(merged(ids()).logits, want) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_gradients_equal_those_of_peft(name, tmp_path):
    """Layer by layer in float64, since transformers computes norms and routers in float32."""
    base = saved(name, tmp_path)
    tuned = by_peft(base, torch.float64, target_modules=ATTENTION, target_parameters=EXPERTS)
    tuned.save_pretrained(tmp_path / "adapters")
    model = read(base, tmp_path / "adapters", torch.float64)
    layer = tuned.base_model.model.model.layers[1]
    block = model.blocks[1]
    experts = block.ffn.experts
    x = torch.randn(30, model.config.dim, dtype=torch.float64)
    scores = torch.rand(30, model.config.moe.num_experts, dtype=torch.float64).softmax(-1)
    weights, chosen = scores.topk(2)
    attention = layer.self_attn
    inner = torch.randn(30, attention.o_proj.in_features, dtype=torch.float64)

    theirs = torch.cat([getattr(attention, name)(x) for name in ATTENTION[:3]], -1)
    theirs = (layer.mlp.experts(x, chosen, weights), theirs, attention.o_proj(inner))
    ours = experts(x, Routing(chosen.int(), weights, scores))
    ours = (ours, block.attention.qkv(x), block.attention.out(inner))
    for a, b in zip(ours, theirs):
        assert relative_error(a, b) < 1e-10
        dy = torch.randn_like(a)
        a.backward(dy)
        b.backward(dy)

    for _, _, adapter in adapters(model):  # write the gradients as PEFT names them
        for parameter in adapter.parameters():
            gradient = parameter.grad
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    to_peft(model, tmp_path / "gradients")
    got = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    want = {
        name.replace(".default", ""): p.grad
        for name, p in tuned.named_parameters()
        if p.grad is not None
    }
    assert len(want) == 2 * 6  # of one layer
    for name, gradient in want.items():
        assert relative_error(got[name], gradient) < 1e-10, name


def describe(folder):
    return PeftFolder(folder).settings, PeftFolder(folder).base


def test_what_is_not_read_is_an_error(tmp_path):
    base = saved("mixtral", tmp_path)
    by_peft(base, target_modules=ATTENTION).save_pretrained(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_config.json"
    config = json.loads(path.read_text())
    model = from_hf(base)
    for change, sentence in [
        (
            {"use_dora": True},
            "has use_dora True; read is None or False only: merge the adapters",
        ),
        ({"peft_type": "IA3"}, r"has peft_type 'IA3'; read is 'LORA' only"),
        ({"r": "8"}, "has no usable r and lora_alpha"),
        ({"r": 0}, "lora rank is 0"),
        ({"r": 2.5}, "has r 2.5; it must be whole"),
        ({"use_rslora": "false"}, "has use_rslora 'false'; read is None or False or True only"),
        (
            {"rank_pattern": {"(a+)+b": 4}},
            r"rank_pattern '\(a\+\)\+b', and regular expr",
        ),
        ({"rank_pattern": {"q_proj": "4"}}, "has '4' in rank_pattern; give a number above 0"),
        ({"target_modules": 3}, "has target_modules 3; it must be a list of names"),
        ({"base_model_name_or_path": "some/hub"}, "base 'some/hub', which is no folder here"),
    ]:
        path.write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=sentence):
            describe(tmp_path / "adapters")
    path.write_text(json.dumps(config))
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"x": torch.ones(1)}, weights)
    with pytest.raises(WeightsError, match="holds x, which the model has no adapter for"):
        PeftFolder(tmp_path / "adapters").targets(model)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.ones(7, 7)}, weights)
    with pytest.raises(WeightsError, match=re.escape("of the shape [7, 7], and the model's is")):
        read(base, tmp_path / "adapters")


def test_what_is_not_written_is_an_error(tmp_path):
    base = saved("mixtral", tmp_path)
    model = from_hf(base)
    with pytest.raises(WeightsError, match="has no LoRA adapters; write it by --to hf"):
        to_peft(model, tmp_path / "adapters")
    add_lora(model, LoraSettings(2, 2.0))
    model.norm.weight.requires_grad_(True)
    with pytest.raises(WeightsError, match=r"holds adapters alone, and norm\.weight was trained"):
        to_peft(model, tmp_path / "adapters")
    dbrx = Dbrx({"size": "tiny"})
    add_lora(dbrx, LoraSettings(2, 2.0))
    with pytest.raises(WeightsError, match=r"no adapter of blocks\.0\.attention\.qkv\.weight"):
        to_peft(dbrx, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def edit_tensors(folder, change):
    """Change the tensors of a folder of adapters."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
EXPERT_A = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
TENSORS = {
    "no A": (lambda t: t.pop(A), rf"holds {B} without its lora_A; save the adapters by PEFT"),
    "no B": (lambda t: t.pop(B), rf"holds {A} without its lora_B; save the adapters by PEFT"),
    "neither": (lambda t: (t.pop(A), t.pop(B)), rf"lacks {A}, which .*_config.json names as a t"),
    "no experts": (
        lambda t: (t.pop(EXPERT_A), t.pop(EXPERT_A.replace("lora_A", "lora_B"))),
        rf"lacks {EXPERT_A}, which .*_config.json names as a target",
    ),
    "renamed": (lambda t: t.update({A.replace("1", "9"): t.pop(A)}), "without its lora_"),
    "rank": (lambda t: t.update({A: t[A][:1], B: t[B][:, :1]}), r"the shape \[1, \d+\], and the"),
    "experts' rank": (
        lambda t: t.update({EXPERT_A: t[EXPERT_A][:1]}),
        r"of the shape \[1, \d+\], and the model's is of \d+ experts",
    ),
    "dtype": (lambda t: t.update({A: t[A].to(torch.int8)}), rf"{A} in .* is I8; weights are read"),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A base, and a folder of adapters of attention and experts."""
    folder = tmp_path_factory.mktemp("both")
    base = saved("mixtral", folder)
    options = {"target_modules": ATTENTION, "target_parameters": EXPERTS}
    by_peft(base, **options).save_pretrained(folder / "adapters")
    return base, folder / "adapters"


def test_numbers_that_are_not_finite_are_named(both, tmp_path, caplog):
    base, adapters = both
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    edit_tensors(folder, lambda tensors: tensors[A].fill_(torch.nan))
    read(base, folder)
    assert "has nan or inf in the adapter of blocks.1.attention.qkv.weight" in caplog.text


@pytest.mark.parametrize("kind", TENSORS)
def test_adapters_that_are_not_whole_are_an_error(both, tmp_path, kind):
    change, sentence = TENSORS[kind]
    base, adapters = both
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    edit_tensors(folder, change)
    with pytest.raises(WeightsError, match=sentence):
        read(base, folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target_modules": ["q_proj"]}, r"holds .*k_proj.lora_A.*names no such target, so PEFT"),
        ({"exclude_modules": ["q_proj"]}, r"holds .*q_proj.lora_A.*names no such target"),
        ({"layers_to_transform": [0]}, r"holds .*layers.1.*lora_A.*names no such target"),
        ({"target_modules": [*ATTENTION, "lm_head"]}, r"lacks .*lm_head.lora_A.weight, which"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'; read is None or True"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens \[1, 2\]; read is None"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\]; read is None"),
    ],
)
def test_a_config_that_disagrees_with_the_adapters_is_an_error(both, tmp_path, change, sentence):
    base, adapters = both
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=sentence):
        read(base, folder)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION, "layers_to_transform": [1]},
        {"target_modules": ATTENTION, "exclude_modules": ["k_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=["layer", "exclude", "regex"],
)
def test_each_way_to_name_targets_is_read(options, tmp_path, caplog):
    base = saved("mixtral", tmp_path)
    tuned = by_peft(base, **options).eval()
    tuned.save_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        got = read(base, tmp_path / "adapters").eval()(ids()).logits
        assert relative_error(got, tuned(ids()).logits) < 1e-5
    assert caplog.text == ""
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaled_by": 3, "unset": None}))
    PeftFolder(tmp_path / "adapters")
    assert "adapter_config.json has keys that are not known here and are left out: scaled_by" in (
        caplog.text
    )


def test_adapters_are_read_into_a_model_that_fsdp_shards(tmp_path):
    """`fully_shard` gives a model a class of its own, which computes the same."""
    base = saved("mixtral", tmp_path)
    by_peft(base, target_modules=ATTENTION).save_pretrained(tmp_path / "adapters")
    folder = PeftFolder(tmp_path / "adapters")
    model = from_hf(base)
    targets = folder.targets(model)
    model.__class__ = type("FSDPMixtral", (FSDPModule, type(model)), {})
    assert folder.targets(model) == targets
