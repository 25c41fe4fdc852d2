"""Every family of transformers that has experts, as a whole model: ours, or a stated fallback."""

import re

import pytest
import torch
from tiny_models import experts_of, families, inputs, logits, tiny_model
from transformers.models.dbrx import modeling_dbrx

from tokenyard.tolerance import relative_error
from tokenyard_models import use_in_transformers
from tokenyard_models.hf import transformers_plugin

FAMILIES = families()
COMPILED = ("dbrx", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_vl_moe")
"""Families that are compiled in every run of the tests; the others are under the marker `full`."""
FIXED = {"doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
FIXED |= {"vitpose_backbone"}
"""Families in which transformers 5.24 lets no implementation be chosen."""
STATED = re.compile(r"(\w+) is computed by transformers' own (grouped_mm|code): (.+)")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Register the experts, and restore DBRX's class after the test."""
    monkeypatch.setattr(modeling_dbrx, "DbrxExperts", modeling_dbrx.DbrxExperts)
    use_in_transformers()
    transformers_plugin._warned.clear()
    torch._dynamo.reset()


@pytest.fixture
def ours(monkeypatch):
    """Return a list that gets one entry for each call of our expert kernels."""
    calls = []
    compute = transformers_plugin._compute

    def counted(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(transformers_plugin, "_compute", counted)
    return calls


def family(module):
    return module.partition(".")[0]


def test_the_walk_finds_the_families():
    assert len(FAMILIES) > 50
    assert FAMILIES["mixtral.modeling_mixtral"] == ["MixtralExperts"]
    assert {family(module) for module in FAMILIES} >= {*COMPILED, *FIXED}


@pytest.mark.parametrize("module", FAMILIES, ids=family)
@torch.no_grad()
def test_ours_or_a_stated_fallback(module, ours, caplog):
    names = FAMILIES[module]
    model = tiny_model(module, names, experts_implementation="tokenyard")
    experts = experts_of(model, names)
    ran = []
    for one in experts:
        if hasattr(one, "has_gate") or type(one).__name__ == "TokenyardDbrxExperts":
            one.register_forward_hook(lambda *_: ran.append(1))
    got = logits(model)
    messages = [record.getMessage() for record in caplog.records if record.name == "tokenyard"]
    stated = [STATED.fullmatch(message).groups() for message in messages]
    if stated:
        [(name, implementation, reason)] = stated
        assert reason
        assert (family(module) in FIXED) == (implementation == "code")
        assert name in (names if implementation == "grouped_mm" else [type(model).__name__])
        assert not ours
    else:
        assert family(module) not in FIXED
        assert len(ours) == len(ran) > 0
    computed_here = len(ours)
    switch(model, experts, "eager")
    want = logits(model)
    assert len(ours) == computed_here
    assert relative_error(got, want) < 1e-5
    switch(model, experts, "tokenyard")
    assert torch.equal(logits(model), got)
    assert len(ours) == 2 * computed_here
    for parameter in (p for one in experts for p in one.parameters()):
        parameter.zero_()
    assert not experts or relative_error(logits(model), want) > 1e-3  # the logits depend on them


def switch(model, experts, implementation):
    """Have a model's experts computed by another implementation."""
    if model.config.model_type == "dbrx":  # it has no experts_implementation
        eager = transformers_plugin._dbrx_class().__mro__[1]
        for one in experts:
            one.__class__ = eager if implementation == "eager" else modeling_dbrx.DbrxExperts
    else:
        model.set_experts_implementation(implementation)


def compiled(module):
    marks = () if family(module) in COMPILED else (pytest.mark.full,)
    return pytest.param(module, marks=marks, id=family(module))


@pytest.mark.parametrize("module", [compiled(module) for module in FAMILIES])
@torch.no_grad()
def test_one_graph_where_the_default_is_one(module):
    names = FAMILIES[module]

    def graph_of(implementation):
        torch._dynamo.reset()
        model = tiny_model(module, names, experts_implementation=implementation)
        want = logits(model)
        graph = torch.compile(model, backend="aot_eager", fullgraph=True)
        outputs = graph(**inputs(model))
        got = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        assert relative_error(got if isinstance(got, torch.Tensor) else got[0], want) < 1e-5

    try:
        graph_of(None)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"no single graph in transformers either: {str(error)[:200]}")
    graph_of("tokenyard")
