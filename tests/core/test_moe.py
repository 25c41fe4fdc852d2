"""The MoE layer as a whole."""

from importlib.metadata import distribution

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokenyard import (
    BackendError,
    ConfigError,
    ExpertWeights,
    LoraSettings,
    MoE,
    Registry,
    RoutingRule,
    Workload,
    add_lora,
    merge_lora,
    moe_layers,
)
from tokenyard.experts import TorchExperts
from tokenyard.registry import installed_plugins
from tokenyard.testing._oracle import experts as oracle
from tokenyard.tolerance import relative_error

D = 16
F_ = 24
E = 6
K = 2


def layer(rule: RoutingRule | None = None, **kwargs) -> MoE:
    return MoE(
        Workload(D, F_, E, K, router=rule or RoutingRule(), dtype=torch.float64),
        dtype=torch.float64,
        **kwargs,
    )


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def test_output_and_gradients_equal_the_equation():
    moe = layer(RoutingRule(normalize=1))
    x = tokens(50).requires_grad_()
    weights = ExpertWeights(moe.experts.up, moe.experts.down)
    probs = (x @ moe.router.weight.T).softmax(-1)
    top, ids = probs.topk(K)
    want = oracle(x, ids, top / top.sum(1, keepdim=True), weights, "swiglu")
    got, routing = moe(x)
    assert torch.equal(routing.topk_ids.long(), ids)
    leaves = [x, *moe.parameters()]
    dy = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy)):
        assert relative_error(a, b) < 1e-13
    assert relative_error(got, want) < 1e-13


def test_any_leading_shape():
    moe = layer()
    x = tokens(3, 7)
    assert torch.equal(moe(x)[0], moe(x.view(21, D))[0].view(3, 7, D))
    assert moe(tokens(0))[0].shape == (0, D)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_shared_expert_and_output_bias(weighted):
    moe = layer(shared_dim=10, shared_weighted_sum=weighted, output_bias=True)
    x = tokens(9)
    nn.init.normal_(moe.bias)
    gate, up = F.linear(x, moe.shared.up).chunk(2, -1)
    shared = F.linear(F.silu(gate) * up, moe.shared.down)
    routed = moe.experts(x, moe.router(x))
    want = (K * routed + shared) / (K + 1) if weighted else routed + shared
    assert relative_error(moe(x)[0], want + moe.bias) < 1e-14


def test_ids_override_the_selection():
    moe = layer()
    x = tokens(12)
    forced = torch.arange(12).unsqueeze(1).add(torch.arange(K)).remainder(E)
    y, routing = moe(x, forced)
    want = oracle(
        x,
        forced,
        moe.router(x, forced).topk_weights,
        ExpertWeights(moe.experts.up, moe.experts.down),
        "swiglu",
    )
    assert torch.equal(routing.topk_ids.long(), forced)
    assert relative_error(y, want) < 1e-13


def test_dropped_slots_add_nothing():
    moe = layer(RoutingRule(capacity_factor=0.5))
    x = tokens(30)
    y, routing = moe(x)
    dropped = (routing.topk_ids >= E).all(1)
    assert dropped.any()
    assert not y[dropped].any()


def test_a_kernel_that_overrides_the_call_alone_adds_to_no_sums():
    class Doubled(TorchExperts):
        def __call__(self, *arguments):
            return 2 * super().__call__(*arguments)

    class DoubledInBoth(Doubled):
        def with_sums(self, *arguments):
            return 2 * super().with_sums(*arguments)

    moe = layer(backends={"experts": "torch"})
    for kernel, adds in ((TorchExperts, True), (Doubled, False), (DoubledInBoth, True)):
        moe.experts.kernel = kernel(moe.workload, moe.experts.permutation)
        assert moe.experts.can_add is adds


def test_backends_have_the_same_state_dict_and_result():
    first = layer()
    x = tokens(20)
    for name in ("cpu", "torch", "loop"):
        moe = layer(backends={"experts": name})
        moe.load_state_dict(first.state_dict())
        assert moe.chosen["experts"].backend.name == name
        assert relative_error(moe(x)[0], first(x)[0]) < 1e-14


def test_loop_has_second_derivatives():
    moe = layer(backends={"experts": "loop"})
    x = tokens(4).requires_grad_()
    ids = moe.router(x).topk_ids
    assert torch.autograd.gradgradcheck(lambda x: moe(x, ids)[0], (x,))


@pytest.mark.parametrize(
    "rule",
    [RoutingRule(), RoutingRule(jitter=0.1, capacity_factor=1.0)],
    ids=["plain", "jitter, capacity"],
)
def test_compiles_whole(rule):
    torch.compiler.reset()
    moe = layer(rule, shared_dim=8, output_bias=True)
    x = tokens(2, 11)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (moe, compiled):
        torch.manual_seed(0)
        y, routing = run(x)
        balance = moe.router.balance(routing)
        gradients.append(
            torch.autograd.grad(y.square().sum() + balance.z_sum, list(moe.parameters()))
        )
    for a, b in zip(*gradients):
        assert relative_error(b, a) < 1e-12


def test_autocast_computes_in_low_precision_and_keeps_float32_weights():
    moe = MoE(Workload(D, F_, E, K, dtype=torch.bfloat16))
    x = torch.randn(40, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = moe(x)
    assert y.dtype == torch.bfloat16
    assert routing.topk_weights.dtype == routing.logits.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())
    weights = ExpertWeights(moe.experts.up.double(), moe.experts.down.double())
    want = oracle(x.double(), routing.topk_ids, routing.topk_weights.double(), weights, "swiglu")
    assert relative_error(y, want) < 4 * torch.finfo(torch.bfloat16).eps


def test_meta_construction_allocates_nothing():
    with torch.device("meta"):
        moe = MoE(Workload(6144, 10752, 16, 4))
    assert all(p.is_meta for p in moe.parameters())
    assert sum(p.numel() for p in moe.parameters()) == 16 * 3 * 6144 * 10752 + 16 * 6144


def test_layers_are_listed_in_order():
    model = nn.Sequential(layer(), nn.Linear(D, D), nn.Sequential(layer()))
    assert moe_layers(model) == [model[0], model[2][0]]


def test_unknown_part_is_named():
    with pytest.raises(
        ConfigError, match=r"backends.expert is not a known key \(did you mean 'experts'\?\)"
    ):
        layer(backends={"expert": "torch"})


def test_expert_parallelism_needs_an_exchange_over_ranks():
    core_only = Registry(*installed_plugins([distribution("tokenyard-core")]))
    with pytest.raises(
        BackendError,
        match=r"no exchange backend is usable here \(local: 'local' keeps tokens on their rank",
    ):
        MoE(Workload(D, F_, E, K, expert_parallel=2), registry=core_only)


@pytest.mark.parametrize("router", ["auto", "torch"])
def test_an_unknown_routing_algorithm_is_named_with_the_installed_ones(router):
    """Whichever router is asked for."""
    sentence = (
        r"routing algorithm 'topkk' is unknown \(did you mean 'topk'\?\); installed: .*, topk$"
    )
    with pytest.raises(BackendError, match=sentence):
        layer(RoutingRule(algorithm="topkk"), backends={"router": router})


def test_another_dtype_than_the_backends_were_chosen_for_is_refused():
    moe = MoE(Workload(D, F_, E, K))
    with pytest.raises(
        BackendError, match="chosen for float32 on cpu, but x would be computed in bfloat16 on cpu"
    ):
        moe(torch.randn(3, D, dtype=torch.bfloat16))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(BackendError, match="computed in bfloat16"),
    ):
        moe(torch.randn(3, D))
    narrow = MoE(Workload(D, F_, E, K, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrow(torch.randn(3, D))[0].isfinite().all()
    with pytest.raises(
        BackendError, match="chosen for bfloat16 on cpu, but x would be computed in float32 on cpu"
    ):
        narrow(torch.randn(3, D))


def test_another_device_than_the_backends_were_chosen_for_is_refused():
    workload = Workload(D, F_, E, K, device="cuda", capability=(9, 0))
    with pytest.raises(
        BackendError,
        match="chosen for float32 on cuda:0, but x would be computed in float32 on cpu",
    ):
        workload.check_input(torch.randn(3, D))
    workload.check_input(torch.randn(3, D, device="meta"))


def test_weights_of_another_dtype_are_named():
    moe = MoE(Workload(D, F_, E, K), dtype=torch.float64)
    with pytest.raises(
        ConfigError, match=r"x is torch.float32 but the experts' weights are torch.float64"
    ):
        moe.experts(torch.randn(3, D), moe.router(torch.randn(3, D, dtype=torch.float64)))


def test_shared_width_out_of_range():
    with pytest.raises(ConfigError, match="shared_dim is 0; it must be at least 1, or left out"):
        layer(shared_dim=0)


def test_prepare_calls_each_part_and_raises_its_errors():
    calls = []
    moe = MoE(Workload(D, F_, E, K), backends={"experts": "torch"})
    moe.prepare(64)  # core's own parts have nothing to compile
    moe.router.prepare = lambda tokens: calls.append(("router", tokens))
    moe.experts.kernel.prepare = lambda tokens: calls.append(("experts", tokens))
    moe.prepare(64)
    assert sorted(calls) == [("experts", 64), ("router", 64)]

    calls.clear()
    moe.experts.kernel.prepare_with_sums = lambda tokens: calls.append(("sums", tokens))
    moe.prepare(48, sums=True)
    assert sorted(calls) == [("router", 48), ("sums", 48)]
    calls.clear()

    add_lora(moe, LoraSettings(2, 2.0), ["experts.*"])
    adapted = []
    moe.experts.kernel.prepare_with_adapter = lambda *given: adapted.append(given)
    moe.prepare(32)  # core computes the adapter, without a compiler
    moe.experts.kernel.max_lora_rank = 2
    moe.prepare(16)
    assert adapted == [(16, moe.experts.adapter)]
    assert sorted(calls) == [("router", 16), ("router", 32)]

    merge_lora(moe)

    def broken(tokens):
        raise BackendError("no compiler")

    moe.experts.kernel.prepare = broken
    with pytest.raises(BackendError, match="no compiler"):
        moe.prepare(64)


def test_a_layer_of_sharded_weights_compiles():
    """On a mesh of one rank. Expert-parallel weights are such DTensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        moe = MoE(Workload(D, F_, E, K))
        x = torch.randn(9, D)
        want = moe(x)[0]
        mesh = init_device_mesh("cpu", (1,))
        for name in ("up", "down"):
            shards = distribute_tensor(getattr(moe.experts, name).detach(), mesh, [Shard(0)])
            setattr(moe.experts, name, torch.nn.Parameter(shards))
        torch.compiler.reset()
        got = torch.compile(moe, fullgraph=True, backend="aot_eager")(x)[0]
        assert relative_error(got, want) < 1e-6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("experts", ["torch", "cpu"])
def test_a_second_derivative_is_refused_and_the_error_names_a_backend_that_has_it(experts):
    moe = MoE(Workload(D, F_, E, K), backends={"experts": experts})
    x = torch.randn(3, D, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated .*; those of 'loop' can"):
        torch.autograd.grad(moe(x)[0].sum(), x, create_graph=True)
    loop = MoE(Workload(D, F_, E, K), backends={"experts": "loop"})
    assert torch.autograd.grad(loop(x)[0].sum(), x, create_graph=True)[0].requires_grad
