"""Every class of experts in the installed transformers: ours, or transformers' stated default."""

import importlib
import inspect
import pickle
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_models import VOCABULARY, dbrx, made, mixtral
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers import models as hf_models_package
from transformers.models.dbrx import modeling_dbrx

from tokenyard.tolerance import relative_error
from tokenyard_models import use_in_transformers
from tokenyard_models.hf import transformers_plugin
from tokenyard_models.hf._experts_module import activation, unsupported

_DECORATED = re.compile(r"@use_experts_implementation.*\nclass (\w+)")
_OWN_WAY = (
    r"it (combines gate and up in a way of its own|normalises)|its (gate|activation|weights) "
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Register the experts, and restore DBRX's class after the test."""
    monkeypatch.setattr(modeling_dbrx, "DbrxExperts", modeling_dbrx.DbrxExperts)
    use_in_transformers()
    torch._dynamo.reset()


class TinySizes(SimpleNamespace):
    """A config of any model of transformers, by the names of its keys."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith(("_act", "_activation")):
            return "silu"
        if "per_tok" in name or name.endswith("top_k"):
            return 2
        if "expert" in name and not name.endswith("size"):
            return 4
        if name.endswith(("size", "dim")):
            return 8
        return {"swiglu_alpha": 1.7, "swiglu_limit": 7.0}.get(name, 1.0)


def experts_classes():
    """Return (module, class) of each class that transformers lets choose an implementation."""
    found = []
    for package in pkgutil.iter_modules(hf_models_package.__path__):
        folder = Path(hf_models_package.__path__[0]) / package.name
        for path in sorted(folder.glob("modeling_*.py")):
            names = _DECORATED.findall(path.read_text(encoding="utf-8"))
            found += [(f"{package.name}.{path.stem}", name) for name in names]
    return found


CLASSES = experts_classes()


def test_the_walk_finds_the_classes():
    assert len(CLASSES) > 40
    assert ("mixtral.modeling_mixtral", "MixtralExperts") in CLASSES


_COMPILED = set()  # sources of classes


def source(cls):
    """Return the source of a class without its names. Most classes are copies of one another."""
    return re.sub(rf'{cls.__name__}|config: \w+|""".*?"""', "", inspect.getsource(cls), flags=re.S)


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_ours_or_the_stated_default_in_one_graph(module, name, caplog):
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    config = TinySizes(_experts_implementation="eager")
    experts = cls(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(9, 8, generator=generator)
    ids = torch.rand(9, 4, generator=generator).topk(2).indices
    weights = torch.rand(9, 2, generator=generator)

    def computed_by(implementation):
        config._experts_implementation = implementation
        return experts(x, ids, weights)

    transformers_plugin._warned.clear()
    got = computed_by("tokenyard")
    if reason := unsupported(experts, activation(experts)):
        assert re.match(_OWN_WAY, reason)
        assert [record.getMessage() for record in caplog.records] == [
            f"{name} is computed by transformers' own grouped_mm: {reason}"
        ]
        assert torch.equal(got, computed_by("grouped_mm"))
    else:
        assert relative_error(got, computed_by("eager")) < 1e-5
        assert not caplog.records
    if source(cls) in _COMPILED:
        return
    _COMPILED.add(source(cls))
    config._experts_implementation = "tokenyard"
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x, ids, weights), got) < 1e-5


def tiny_gpt_oss():
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return GptOssConfig(**sizes, **heads, num_local_experts=4, vocab_size=VOCABULARY)


@pytest.mark.parametrize(
    "config",
    [mixtral(), tiny_gpt_oss(), mixtral(hidden_act="tanh"), dbrx()],
    ids=["mixtral", "gpt_oss", "fallback", "dbrx"],
)
def test_a_model_is_one_graph(config):
    """As with transformers' grouped_mm, with gradients and under autocast too."""
    torch.manual_seed(0)
    named = {} if config.model_type == "dbrx" else {"experts_implementation": "tokenyard"}
    model = AutoModelForCausalLM.from_config(config, **named)
    ids = torch.arange(1, 11).view(2, 5)
    want = model(ids).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(ids).logits
    assert relative_error(got, want) < 1e-5
    grads = torch.autograd.grad(got.square().sum(), [*model.parameters()], allow_unused=True)
    wanted = torch.autograd.grad(want.square().sum(), [*model.parameters()], allow_unused=True)
    for one, two in zip(grads, wanted, strict=True):
        assert (one is None) == (two is None)
        assert one is None or relative_error(one, two) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(compiled(ids).logits, model(ids).logits) < 0.02


def test_experts_of_several_sizes_in_one_model_are_one_graph():
    one = mixtral()
    layers = [
        AutoModelForCausalLM.from_config(
            mixtral(**size, num_hidden_layers=1), experts_implementation="tokenyard"
        )
        .model.layers[0]
        .mlp
        for size in ({}, {"num_local_experts": 3}, {"intermediate_size": 7})
    ]
    stack = torch.nn.Sequential(*layers)
    x = torch.randn(2, 5, one.hidden_size)
    assert torch.equal(torch.compile(stack, backend="aot_eager", fullgraph=True)(x), stack(x))


@pytest.mark.parametrize("config", [dbrx(), mixtral()], ids=["dbrx", "mixtral"])
def test_models_pickle(config):
    model = made(config)
    if config.model_type == "mixtral":
        model.set_experts_implementation("tokenyard")
    else:
        cls = type(model.transformer.blocks[0].ffn.experts)
        assert (cls.__module__, cls.__name__) == (
            transformers_plugin.__name__,
            "TokenyardDbrxExperts",
        )
        assert inspect.isclass(transformers_plugin.TokenyardDbrxExperts)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    ids = torch.arange(1, 11).view(2, 5)
    assert torch.equal(again(ids).logits, model(ids).logits)
