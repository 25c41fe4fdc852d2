"""tokenyard's experts in transformers' models compute what transformers' own experts do."""

import copy
import logging
import sys

import pytest
import torch
from hf_models import MODELS, VOCABULARY, made
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.dbrx import modeling_dbrx
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tokenyard import ConfigError
from tokenyard.tolerance import relative_error
from tokenyard_models import use_in_transformers
from tokenyard_models.hf import _experts_module, transformers_plugin

DBRX = tuple(name for name in MODELS if name.startswith("dbrx"))
TOLERANCE = 1e-5


@pytest.fixture
def registered(monkeypatch):
    """Register the experts, and restore DBRX's class after the test."""
    monkeypatch.setattr(modeling_dbrx, "DbrxExperts", modeling_dbrx.DbrxExperts)
    use_in_transformers()
    use_in_transformers()  # changes nothing


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save every model; return its folder, and logits and gradients of eager experts."""
    saved = {}
    for name, config in MODELS.items():
        model = made(config)
        folder = tmp_path_factory.mktemp("published") / "model"
        model.save_pretrained(folder)
        saved[name] = (folder, *results(model))
    return saved


def results(model):
    torch.manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (2, 40))
    logits = model(ids).logits
    (logits * torch.randn(logits.shape)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(model, want_logits, want_gradients):
    logits, gradients = results(model)
    assert relative_error(logits, want_logits) < TOLERANCE
    assert gradients.keys() == want_gradients.keys()
    for name in gradients:
        assert relative_error(gradients[name], want_gradients[name]) < TOLERANCE, name


@pytest.mark.parametrize("name", [name for name in MODELS if name not in DBRX])
def test_logits_and_gradients(registered, folders, name):
    folder, logits, gradients = folders[name]
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="tokenyard")
    assert model.config._experts_implementation == "tokenyard"
    check(model, logits, gradients)


@pytest.mark.parametrize("name", DBRX)
def test_the_class_of_dbrx_experts_is_replaced(registered, folders, name):
    folder, logits, gradients = folders[name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.transformer.blocks[0].ffn.experts).__name__ == "TokenyardDbrxExperts"
    check(model, logits, gradients)


def test_grouped_mm_computes_the_same(registered, folders):
    folder, *want = folders["mixtral"]
    check(AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm"), *want)


def test_generating(registered, folders):
    """Switch a model to tokenyard after it was built."""
    model = AutoModelForCausalLM.from_pretrained(
        folders["mixtral"][0], experts_implementation="eager"
    )
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    want = model.generate(prompt, **options)
    model.set_experts_implementation("tokenyard")
    assert torch.equal(model.generate(prompt, **options), want)


def experts(has_gate, has_bias, is_transposed):
    """Return a module of experts as transformers defines them."""

    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.act_fn = torch.nn.SiLU()
            e, d, f = (4, 8, 12)
            rows = (2 if has_gate else 1) * f
            sizes = {
                "gate_up_proj" if has_gate else "up_proj": (e, rows, d),
                "down_proj": (e, d, f),
            }
            for name, size in sizes.items():
                weight = torch.randn(size)
                self.register_parameter(
                    name, torch.nn.Parameter(weight.mT.contiguous() if is_transposed else weight)
                )
                if has_bias:
                    self.register_parameter(
                        f"{name}_bias", torch.nn.Parameter(torch.randn(size[:2]))
                    )

        def forward(self, *_):
            raise AssertionError("eager experts ran")

    made_by = use_experts_implementation(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed
    )
    return made_by(Experts)(type("Config", (), {"_experts_implementation": "tokenyard"})())


def by_hand(module, x, ids, weights):
    """Compute token by token; id 4 is padding."""
    y = torch.zeros_like(x)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    for t, k in ((t, k) for t in range(len(x)) for k in range(ids.shape[1]) if ids[t, k] < 4):
        e = ids[t, k]
        one, two = (w[e].mT if module.is_transposed else w[e] for w in (up, module.down_proj))
        z = one @ x[t]
        if module.has_bias:
            z = z + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[e]
        a = torch.nn.functional.silu(z[:12]) * (z[12:] if module.has_gate else 1)
        out = two @ a + (module.down_proj_bias[e] if module.has_bias else 0)
        y[t] = y[t] + weights[t, k] * out
    return y


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_every_form_of_weights_and_padding_ids(registered, has_gate, has_bias, is_transposed):
    torch.manual_seed(1)
    module = experts(has_gate, has_bias, is_transposed)
    x = torch.randn(9, 8)
    ids = torch.rand(9, 5).topk(3).indices
    weights = torch.rand(9, 3, requires_grad=True)
    assert (ids == 4).any()
    leaves = [*module.parameters(), weights]
    got = module(x, ids, weights)
    want = by_hand(module, x, ids, weights)
    assert relative_error(got, want) < TOLERANCE
    dy = torch.randn(9, 8)
    for one, two in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy)
    ):
        assert relative_error(one, two) < TOLERANCE


def test_autocast_is_followed(registered):
    """float32 weights under autocast give the bits of bfloat16 weights, and float32 gradients."""
    torch.manual_seed(1)
    module = experts(True, True, False)
    x = torch.randn(9, 8)
    ids = torch.rand(9, 5).topk(3).indices
    weights = torch.rand(9, 3)
    dy = torch.randn(9, 8)
    narrow = copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, ids, weights)
    want = narrow(x.bfloat16(), ids, weights)
    assert got.dtype == torch.float32
    assert torch.equal(got, want.float())
    gradients = torch.autograd.grad(got, list(module.parameters()), dy)
    for one, two in zip(
        gradients, torch.autograd.grad(want, list(narrow.parameters()), dy.bfloat16())
    ):
        assert one.dtype == torch.float32
        assert torch.equal(one, two.float())


@pytest.mark.parametrize("limit", [0.05, 7.0])
def test_gpt_oss_is_computed_by_ours(registered, caplog, limit):
    """Its gate and up take turns, are clamped and have biases; gradients arrive in its tensors."""
    transformers_plugin._warned.clear()
    model = tiny_gpt_oss().double()
    for layer in model.model.layers:
        layer.mlp.experts.limit = limit
    ids = torch.randint(0, VOCABULARY, (2, 9))
    results = []
    for implementation in ("eager", "tokenyard"):
        model.set_experts_implementation(implementation)
        got = model(ids).logits
        experts = model.model.layers[0].mlp.experts
        grads = torch.autograd.grad(got.square().sum(), [*experts.parameters()])
        results.append((got.detach(), *grads))
    for got, want in zip(results[1], results[0], strict=True):
        assert relative_error(got, want) < 1e-10
    assert not caplog.records


def test_a_gate_of_another_kind_falls_back_to_transformers_default(registered, caplog, monkeypatch):
    """One warning is logged for all its layers."""
    transformers_plugin._warned.clear()

    def apply_gate(self, gate_up):
        return gate_up[..., ::2] * gate_up[..., 1::2].sin()

    monkeypatch.setattr(GptOssExperts, "_apply_gate", apply_gate)
    _experts_module._probe.cache_clear()
    model = tiny_gpt_oss()
    assert model.config._experts_implementation == "grouped_mm"
    ids = torch.randint(0, VOCABULARY, (2, 9))
    want = model(ids).logits
    model.set_experts_implementation("tokenyard")
    with caplog.at_level(logging.WARNING, logger="tokenyard"):
        assert torch.equal(model(ids).logits, want)
    _experts_module._probe.cache_clear()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "GptOssExperts is computed by transformers' own grouped_mm: it combines gate"
    )


def tiny_gpt_oss():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = GptOssConfig(
        **sizes, num_key_value_heads=1, head_dim=16, num_local_experts=4, vocab_size=VOCABULARY
    )
    config.eos_token_id = config.pad_token_id = 3
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ConfigError, match=r"transformers 5\.14 or later is needed .*; pip install"):
        use_in_transformers()
