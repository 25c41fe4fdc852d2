"""Adapters compute x W^T + s (x A^T) B^T, and are the only trained parameters."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenyard import (
    ConfigError,
    FeedForward,
    LoraSettings,
    MoE,
    Workload,
    add_lora,
    merge_lora,
)
from tokenyard.experts import _lora_backward
from tokenyard.lora import head_inputs, lora_weights
from tokenyard.tolerance import relative_error

D = 12
F_ = 10
E = 5
LORA = LoraSettings(3, 6.0)
TARGETS = ["experts.up", "experts.down", "shared.up", "shared.down"]


class Net(nn.Module):
    """A linear layer with two parts, an MoE layer with a shared expert, a head."""

    def __init__(self, activation="swiglu", bias=True):
        super().__init__()
        dtype = torch.float64
        self.vocab_size = 17
        self.fused_rows = {"mix.weight": (4, D - 4)}
        self.mix = nn.Linear(D, D, dtype=dtype)
        workload = Workload(D, F_, E, 2, dtype=dtype, activation=activation, bias=bias)
        self.moe = MoE(workload, dtype=dtype, shared_dim=7)
        self.head = nn.Linear(D, self.vocab_size, bias=False, dtype=dtype)

    def forward(self, x, topk_ids=None):
        x = self.moe(self.mix(x), topk_ids)[0]
        return F.linear(*head_inputs(x, self.head))


def adapted(net, targets="*", settings=LORA):
    """Add adapters whose B is not zero."""
    add_lora(net, settings, targets)
    for name, parameter in net.named_parameters():
        if ".adapter." in name and name.endswith("_b"):
            nn.init.normal_(parameter)
    return net


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net()


def tokens():
    return torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(net, x, dy):
    x = x.clone().requires_grad_()
    y = net(x)
    y.backward(dy)
    return y.detach(), x.grad, {n: p.grad for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", ["*", "all-linear", ["experts.*"], ["shared.down", "head.*"]])
def test_a_new_adapter_changes_nothing(net, targets):
    before = net(tokens())
    add_lora(net, LORA, targets)
    assert relative_error(net(tokens()), before) < 1e-15


@pytest.mark.parametrize("settings", [LORA, LoraSettings(4, 3.0, rank_stabilized=True)], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients_follow_from_those_of_the_weights(activation, settings):
    """d B = s dW A^T and d A = s B^T dW, where dW is the gradient of the merged weights."""
    torch.manual_seed(1)
    net = adapted(Net(activation), settings=settings)
    dy = torch.randn(40, net.vocab_size, dtype=torch.float64)
    y, dx, got = gradients(net, tokens(), dy)
    assert got
    assert all(".adapter." in name for name in got)
    assert settings.scale == (1.5 if settings.rank_stabilized else 2.0)

    matrices = {name: p.detach().clone() for name, p in net.named_parameters()}
    merge_lora(net)
    merged = Net(activation)
    merged.load_state_dict(net.state_dict())
    want_y, want_dx, want = gradients(merged, tokens(), dy)
    assert relative_error(y, want_y) < 1e-12
    assert relative_error(dx, want_dx) < 1e-12
    for name, (_, attribute, parts) in lora_weights(merged).items():
        adapter = name.removesuffix(attribute) + f"adapter.{attribute}"
        a, b = (matrices[f"{adapter}_{one}"] for one in "ab")
        sizes = parts or [b.shape[-2]]
        parts = list(
            zip(want[name].split(sizes, -2), a.split(settings.rank, -2), b.split(sizes, -2))
        )
        want_b = torch.cat([settings.scale * dw @ a.mT for dw, a, _ in parts], -2)
        want_a = torch.cat([settings.scale * b.mT @ dw for dw, _, b in parts], -2)
        assert relative_error(got[f"{adapter}_b"], want_b) < 1e-12, name
        assert relative_error(got[f"{adapter}_a"], want_a) < 1e-12, name


@pytest.mark.parametrize("also", [[], ["up"], ["down", "up_bias", "down_bias"]], ids=str)
def test_exactly_the_trained_parameters_get_gradients(net, also):
    adapted(net, ["experts.down", "mix.weight"])
    for name in also:
        getattr(net.moe.experts, name).requires_grad_(True)
    _, _, got = gradients(net, tokens(), torch.ones(40, net.vocab_size, dtype=torch.float64))
    assert {name for name, gradient in got.items() if gradient is not None} == {
        *(f"moe.experts.adapter.down_{one}" for one in "ab"),
        *(f"mix.adapter.weight_{one}" for one in "ab"),
        *(f"moe.experts.{name}" for name in also),
    }
    merge_lora(net)
    for name in also:
        getattr(net.moe.experts, name).grad = None
    _, _, want = gradients(net, tokens(), torch.ones(40, net.vocab_size, dtype=torch.float64))
    for name in also:
        full = f"moe.experts.{name}"
        assert relative_error(got[full], want[full]) < 1e-12, name


@contextmanager
def outputs_of_matmuls():
    """Record the shapes that grouped matmuls of experts return."""
    shapes = []

    def recording(call):
        def record(*args):
            out = call(*args)
            shapes.append(tuple(out.shape))
            return out

        return record

    names = ("rows_times", "rows_outer")
    calls = {name: recording(getattr(_lora_backward, name)) for name in names}
    with patch.multiple(_lora_backward, **calls):
        yield shapes


def test_no_matmul_has_the_size_of_frozen_experts(net):
    adapted(net)
    with outputs_of_matmuls() as shapes:
        net(tokens()).sum().backward()
    of_experts = [shape for shape in shapes if len(shape) == 3]
    assert sorted(of_experts) == sorted(
        tuple(p.shape) for p in net.moe.experts.adapter.parameters()
    )


@pytest.mark.parametrize("ids", ["dropped", "one expert"])
def test_dropped_slots_and_idle_experts(net, ids):
    adapted(net)
    topk_ids = torch.full((40, 2), E, dtype=torch.int32)
    topk_ids[::3, 0] = 2
    if ids == "one expert":
        topk_ids[:, 0] = 2
        topk_ids[:, 1] = 3
    dy = torch.randn(40, net.vocab_size, dtype=torch.float64)
    y = net(tokens(), topk_ids)
    y.backward(dy)
    experts = net.moe.experts.adapter
    assert not experts.up_a.grad[[0, 1, 4]].any()
    assert not experts.down_b.grad[[0, 1, 4]].any()
    merge_lora(net)
    assert relative_error(net(tokens(), topk_ids), y) < 1e-12


def test_dropout_keeps_the_mean_in_training_and_is_off_in_evaluation(net):
    torch.manual_seed(3)
    adapted(net, "experts.down", LoraSettings(3, 0.5, dropout=0.5))
    net.eval()
    want = net(tokens())
    assert torch.equal(net(tokens()), want)
    net.train()
    draws = torch.stack([net(tokens()).detach() for _ in range(400)])
    assert (draws[0] != draws[1]).any()
    assert relative_error(draws.mean(0), want) < 0.05


@pytest.mark.parametrize("target", [*TARGETS, "mix.weight", "head.weight"])
def test_gradients_under_dropout_are_those_of_the_function(net, target):
    """The masks are drawn anew from the same seed, so finite differences see one function."""
    adapted(net, target, LoraSettings(2, 2.0, dropout=0.3)).train()
    trained = [p for p in net.parameters() if p.requires_grad]

    def function(x, *_):
        torch.manual_seed(7)
        return net(x).sin().sum()

    x = tokens()[:6].requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *trained), fast_mode=True)


def test_merging_computes_the_same_without_adapters(net):
    before = adapted(net)(tokens())
    merge_lora(net)
    assert not any("adapter" in name for name, _ in net.named_parameters())
    assert relative_error(net(tokens()), before) < 1e-12
    add_lora(net, LORA)  # adapters can be added again


def test_all_linear_leaves_the_head_and_the_router_out(net):
    add_lora(net, LORA)
    names = {name.partition("adapter")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert names == {"mix.", "moe.experts.", "moe.shared."}


def test_in_bfloat16_and_under_autocast():
    torch.manual_seed(1)
    work = Workload(16, 8, 4, 2, dtype=torch.bfloat16)
    x = torch.randn(30, 16)
    moe = adapted(MoE(work, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)[0]
    y.float().sum().backward()
    assert moe.experts.adapter.up_a.grad.dtype == torch.float32
    narrow = moe.to(torch.bfloat16)
    assert relative_error(narrow(x.bfloat16())[0].float(), y.float()) < 0.02


def test_fullgraph_compile(net):
    adapted(net)
    for parameter in net.parameters():
        parameter.grad = None
    want = net(tokens())
    got = torch.compile(net, backend="aot_eager", fullgraph=True)(tokens())
    assert relative_error(got, want) < 1e-12
    got.sum().backward()
    assert net.moe.experts.adapter.up_a.grad is not None


def test_a_dense_network():
    torch.manual_seed(1)
    dense = adapted(FeedForward(D, 8, "swiglu", bias=True).double(), ["up", "down"])
    assert dense.adapter.up_a.shape == (6, D)  # gate and up projection each have an A
    y = dense(tokens())
    merge_lora(dense)
    assert relative_error(dense(tokens()), y) < 1e-12


def test_mistakes(net):
    adapted(net)
    with pytest.raises(
        ConfigError, match="has adapters already; merge_lora makes them part of the weights"
    ):
        add_lora(net, LORA)
    with pytest.raises(
        ConfigError,
        match=r"'q_proj' matches no weight; those that may have an adapter are: mix\.weight, moe",
    ):
        add_lora(Net(), LORA, ["q_proj"])
    with pytest.raises(ConfigError, match=r"matches no weight \(did you mean 'head\.weight'"):
        add_lora(Net(), LORA, ["head.wieght"])
    with pytest.raises(ConfigError, match="lora rank is 0"):
        LoraSettings(0, 1.0)
    with pytest.raises(ConfigError, match="lora dropout is 1; it must be at least 0 and below 1"):
        LoraSettings(1, 1.0, 1)


def test_experts_of_several_widths_are_refused():
    """Grouped matmuls would use columns that an expert does not have."""
    experts = MoE(Workload(D, F_, E, 2)).experts
    experts.workload = replace(experts.workload, ffn_dims=(F_, 5, F_, F_, F_))
    with pytest.raises(ConfigError, match=r"experts of one width, and ffn_dims is \[10, 5"):
        add_lora(experts, LORA, ["up"])
