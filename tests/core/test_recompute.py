"""Recompute: which operators the selective one keeps, what runs again, and what it draws."""

from collections import Counter

import pytest
import torch
import torch.nn.attention.varlen  # defines torch_attn::_varlen_attn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard import MoE, Workload
from tokenyard.operators import operator
from tokenyard.recompute import is_kept, recomputed
from tokenyard.recompute_rng import RecomputeRng

aten = torch.ops.aten


class Calls(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name().partition(".")[0])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "op",
    [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops._c10d_functional.all_to_all_single.default,
        torch.ops.tokenyard.experts.default,
        torch.ops.tokenyard.cpu_experts.default,
    ],
    ids=str,
)
def test_matmuls_attention_experts_and_exchanges_are_kept(op):
    assert is_kept(op, (), {})


@pytest.mark.parametrize(
    "op",
    [
        aten.mul.Tensor,
        aten.silu.default,
        aten.native_layer_norm.default,
        aten._to_copy.default,
        aten.cat.default,
        torch.ops.tokenyard.permute.default,
    ],
    ids=str,
)
def test_elementwise_operators_and_moves_of_rows_are_not_kept(op):
    assert not is_kept(op, (torch.zeros(1),), {"dtype": torch.bfloat16})


def test_copies_to_the_host_are_kept():
    to_cpu = {"device": torch.device("cpu")}
    assert is_kept(aten._to_copy.default, (torch.zeros(1, device="meta"),), to_cpu)
    assert not is_kept(aten._to_copy.default, (torch.zeros(1),), to_cpu)


def test_an_operator_of_a_plugin_is_kept_if_it_says_so():
    kept = operator("test_recompute::sort_rows", "(Tensor x) -> Tensor", kept=True)(torch.clone)
    other = operator("test_recompute::scale_rows", "(Tensor x) -> Tensor")(torch.clone)
    assert is_kept(kept.op, (), {})
    assert not is_kept(other.op, (), {})


@pytest.mark.parametrize("backend", ["torch", "cpu", "loop"])
def test_norms_run_again_and_matmuls_do_not(backend):
    moe = MoE(Workload(16, 16, 4, 2, activation="swiglu"), backends={"experts": backend})
    norm = nn.LayerNorm(16)
    x = torch.randn(10, 16, requires_grad=True)
    plain, selective, whole = (
        backward_calls(forward, moe, norm, x)
        for forward in (block, recomputed(block, selective=True), recomputed(block))
    )
    repeated = set((selective[0] - plain[0]).elements())
    assert "aten::native_layer_norm" in repeated
    assert not repeated & {
        "aten::mm",
        "aten::addmm",
        "tokenyard::experts",
        "tokenyard::cpu_experts",
    }
    assert (whole[0] - selective[0])["aten::mm"] >= 1
    for gradients in (selective[1], whole[1]):
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain[1]))


def block(moe, norm, x):
    y, routing = moe(norm(x))
    return x + y, moe.router.balance(routing).prob_sum


def backward_calls(forward, moe, norm, x):
    """Return how often each operator ran in the backward pass, and the gradients."""
    y, prob_sum = forward(moe, norm, x)
    loss = y.square().sum() + prob_sum.square().sum()
    with Calls() as calls:
        gradients = torch.autograd.grad(loss, [x, *norm.parameters(), *moe.parameters()])
    return Counter(calls.names), gradients


def test_a_second_backward_pass_is_an_error():
    weight = torch.randn(4, 4, requires_grad=True)
    y = recomputed(lambda x: (x @ weight).tanh(), selective=True)(torch.randn(2, 4))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        y.sum().backward()


@pytest.mark.parametrize("selective", [False, True])
def test_the_compiler_traces_a_recomputed_function(selective):
    weight = torch.randn(4, 4)

    def block(x):
        return (x @ weight).tanh().exp()

    compiled = torch.compile(recomputed(block, selective), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, requires_grad=True)
    got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, block))
    torch.testing.assert_close(got, want)


class FakeGenerator:
    """A GPU's generator on a CPU: a state of seed and offset, which others may share."""

    device = "cpu"

    def __init__(self, state=None):
        self.state = state or {"seed": 0, "offset": 0}

    def draw(self):
        """Return the seed and the offset of 4 random numbers, and go past them."""
        self.state["offset"] += 4
        return self.state["seed"], self.state["offset"] - 4

    def manual_seed(self, seed):
        self.state.update(seed=seed, offset=0)

    def initial_seed(self):
        return self.state["seed"]

    def get_offset(self):
        return self.state["offset"]

    def set_offset(self, offset):
        self.state["offset"] = offset

    def graphsafe_get_state(self):
        return FakeGenerator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


class FakeGraph:
    """A captured graph: replays run the function, with the states that are registered."""

    def __init__(self):
        self.states = []

    def register_generator_state(self, generator):
        self.states.append(generator)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("random", [True, False])
def test_in_a_cuda_graph_a_recompute_draws_what_its_forward_pass_drew(
    monkeypatch, selective, random
):
    main = FakeGenerator()
    monkeypatch.setattr(torch, "Generator", lambda device: FakeGenerator())
    drawn = []

    def block(x):
        drawn.append(main.draw() if random else None)
        return x.tanh().exp()

    blocks = [recomputed(block, selective=selective) for _ in range(3)]

    def run():
        drawn.clear()
        x = torch.ones(3, requires_grad=True)
        for each in blocks:
            x = each(x)
        x.sum().backward()
        return drawn[:3], drawn[:2:-1]

    rng = RecomputeRng(main)
    main.manual_seed(5)
    with rng.recording():
        run()
    main.set_offset(12 if random else 0)  # torch restores only a real generator
    graph = FakeGraph()
    rng.register(graph)
    assert len(graph.states) == (3 if random else 0)
    for seed in (6, 7):
        main.manual_seed(seed)
        main.set_offset(40)
        rng.rewind()
        with rng.capturing():
            forward, again = run()
        assert forward == again
        assert forward == ([(seed, 40), (seed, 44), (seed, 48)] if random else [None] * 3)
        assert main.get_offset() == (52 if random else 40)
