"""MegaBlocks' Python API: its equations, its layouts, and a script that knows MegaBlocks alone."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokenyard
from tokenyard import ConfigError, Workload
from tokenyard_models.megablocks import Arguments, MoE, dMoE
from tokenyard_models.megablocks.__main__ import main
from tokenyard_models.megablocks.layers import dmlp_registry, mpu
from tokenyard_models.megablocks.layers.arguments import from_megatron
from tokenyard_models.megablocks.layers.moe import (
    batched_load_balancing_loss,
    clear_load_balancing_loss,
    get_load_balancing_loss,
)
from tokenyard_models.megablocks.layers.router import batched_router_zloss, clear_router_zloss

SIZES = {"hidden_size": 12, "ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2}
TANH_GELU = partial(F.gelu, approximate="tanh")


@pytest.fixture(autouse=True)
def cleared():
    yield
    clear_load_balancing_loss()
    clear_router_zloss()


def arguments(**changes):
    """Small layers on the CPU, in float64 after `.double()`."""
    given = SIZES | {"fp16": False, "device": "cpu", "return_bias": False} | changes
    return Arguments(**given, init_method=partial(torch.nn.init.normal_, std=0.4))


def expected(layer, args, x, capacity=None):
    """The layer by MegaBlocks' equations: every expert on every token, one token at a time."""
    tokens = x.reshape(-1, args.hidden_size)
    scores = (tokens @ layer.router.layer.weight.T).softmax(-1)
    weights, ids = scores.topk(args.moe_top_k)
    if args.moe_normalize_expert_weights:
        p = args.moe_normalize_expert_weights
        weights = weights / weights.norm(p=p, dim=-1, keepdim=True)
    if args.uniform_expert_assignment:
        ids = torch.arange(ids.numel()).view(ids.shape) % args.moe_num_experts
    mlp = layer.experts.mlp
    dropless = isinstance(layer, dMoE)
    parts = [
        w.unflatten(0, (args.moe_num_experts, -1)) if dropless else w for w in (mlp.w1, mlp.w2)
    ]
    up, down = parts if dropless else (parts[0].mT, parts[1])  # [E, F, D]
    used = [0] * args.moe_num_experts
    rows = []
    for token, token_weights, token_ids in zip(tokens, weights, ids):
        row = torch.zeros_like(token)
        for weight, expert in zip(token_weights, token_ids.tolist()):
            used[expert] += 1
            if capacity and used[expert] > capacity:
                continue
            hidden = args.activation_fn(up[expert] @ token)
            if args.mlp_type == "glu":
                v1 = mlp.v1.unflatten(0, (args.moe_num_experts, -1))
                hidden = hidden * (v1[expert] @ token)
            row = row + weight * (hidden @ down[expert])
        rows.append(row)
    y = torch.stack(rows).view(x.shape)
    if args.bias:
        y = y + layer.experts.bias
    loss = args.moe_loss_weight * args.moe_num_experts / (len(tokens) * args.moe_top_k)
    return y, loss * (torch.tensor(used).double() * scores.mean(0)).sum()


def error(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (dMoE, {}),
        (dMoE, {"mlp_type": "glu", "activation_fn": F.silu, "bias": False}),
        (dMoE, {"mlp_type": "glu"}),  # tanh GELU has no gated kernel
        (dMoE, {"activation_fn": lambda z: z.sigmoid(), "mlp_impl": "sparse"}),
        (dMoE, {"moe_normalize_expert_weights": 1, "memory_optimized_mlp": True}),
        (dMoE, {"uniform_expert_assignment": True, "moe_top_k": 3}),
        (MoE, {"moe_capacity_factor": 1}),
        (MoE, {"moe_capacity_factor": 0, "moe_top_k": 1}),
        (MoE, {"moe_capacity_factor": 0.5, "activation_fn": F.relu}),
    ],
)
def test_layers_follow_megablocks_equations_with_gradients(kind, changes):
    args = arguments(**changes)
    layer = kind(args).double()
    torch.nn.init.normal_(layer.experts.bias) if args.bias else None
    x = torch.randn(9, 2, 12, dtype=torch.float64, requires_grad=True)
    capacity = int(args.moe_capacity_factor * args.moe_top_k * 18 / 4) if kind is MoE else None
    want, want_loss = expected(layer, args, x, capacity)
    incoming = torch.randn_like(want)
    tensors = [x, *layer.parameters()]
    want_gradients = torch.autograd.grad((want * incoming).sum() + want_loss, tensors)
    y = layer(x)
    loss = batched_load_balancing_loss(args)
    gradients = torch.autograd.grad((y * incoming).sum() + loss, tensors)
    assert error(y, want) < 1e-12
    assert error(loss, want_loss) < 1e-12
    for have, gradient in zip(gradients, want_gradients):
        assert error(have, gradient) < 1e-12


def test_an_activation_for_one_dtype_is_computed_expert_by_expert():
    """As a kernel of the script's own is."""

    def own(z):
        assert z.dtype == torch.float32, "only float32"
        return z.sigmoid()

    layer = dMoE(arguments(activation_fn=own))
    x = torch.randn(5, 1, 12)
    plain = dMoE(arguments(activation_fn=torch.sigmoid))
    plain.load_state_dict(layer.state_dict())
    assert error(layer(x), plain(x)) < 1e-6


def test_z_loss_shared_experts_and_a_returned_bias():
    args = arguments(moe_zloss_weight=0.1, num_layers=2, return_bias=True)
    layers = [dMoE(args), dMoE(args)]
    x = torch.randn(5, 1, 12)
    for layer in layers:
        y, bias = layer(x)
        assert y.shape == x.shape
        assert bias is layer.experts.bias
    logits = torch.stack([F.linear(x.view(5, 12), layer.router.layer.weight) for layer in layers])
    want = 0.1 * logits.logsumexp(-1).square().mean(-1)
    assert torch.allclose(batched_router_zloss(args), want)
    assert batched_load_balancing_loss(args) > 0
    shared = arguments(shared_expert=True, shared_expert_weighted_sum=True, mlp_type="glu")
    layer = dMoE(shared)
    part = layer.shared_expert
    assert part.gate_proj.weight.shape == (20, 12)
    dense = part.down_proj(TANH_GELU(part.gate_proj(x)) * part.up_proj(x))
    routed = layer.experts(x, *layer.router(x))
    assert torch.allclose(layer(x), dense / 3 + routed * 2 / 3, atol=1e-6)


def test_every_field_has_an_effect_or_says_that_it_has_none():
    """`test_layers...` and the tests below cover the fields that have one."""
    without = {
        *("moe_lbl_in_fp32", "memory_optimized_mlp", "mlp_impl", "remat_act_fn"),
        *("moe_zloss_in_fp32",),
    }
    assert without <= {field.name for field in dataclasses.fields(Arguments)}
    same = from_megatron(arguments(moe_lbl_in_fp32=True, remat_act_fn=False))
    assert (same.hidden_size, same.moe_lbl_in_fp32) == (12, True)
    args = arguments(pipeline_model_parallel_size=2, num_layers=4)
    for _ in range(2):
        dMoE(args)(torch.randn(3, 1, 12))
    half = batched_load_balancing_loss(args)
    args = dataclasses.replace(args, num_layers_per_virtual_pipeline_stage=2, num_layers=2)
    assert torch.allclose(2 * half, batched_load_balancing_loss(args))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mlp_type": "moe"}, "mlp_type 'moe' is unknown; known are: mlp, glu"),
        ({"mlp_impl": "dense"}, "mlp_impl 'dense' is unknown"),
        ({"moe_top_k": 5}, "moe_top_k is 5 but moe_num_experts is 4"),
        ({"shared_expert": True, "return_bias": True}, "set return_bias=False"),
        ({"moe_capacity_factor": -1}, "moe_capacity_factor is -1; it must be a number of at least"),
        ({"num_layers": 0}, "num_layers is 0; it must be a number of at least 1"),
        ({"moe_jitter_eps": 2}, "moe_jitter_eps is 2; it must be below 1"),
        ({"activation_fn": None}, "activation_fn is None; give a function of a tensor"),
    ],
)
def test_what_is_not_here_is_one_sentence(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        arguments(**changes)


def test_more_refusals():
    with pytest.raises(ConfigError, match="MoE has no gated experts; use dMoE"):
        MoE(arguments(mlp_type="glu"))
    dMoE(arguments())(torch.randn(3, 1, 12))
    with pytest.raises(ConfigError, match=r"1 layers have saved .* makes it 3 in a stage"):
        batched_load_balancing_loss(arguments(num_layers=3))
    dMoE(arguments())(torch.randn(4, 1, 12))
    with pytest.raises(ConfigError, match="different numbers of tokens"):
        batched_load_balancing_loss(arguments(num_layers=2))
    with pytest.raises(ConfigError, match="no router has saved logits"):
        batched_router_zloss(arguments(moe_zloss_weight=0.1))
    with pytest.raises(ConfigError, match="block-sparse topologies are not read"):
        dmlp_registry.get(arguments())(torch.randn(3, 12), object())


def test_evaluation_saves_nothing_and_jitter_is_of_training_alone():
    layer = dMoE(arguments(moe_jitter_eps=0.5)).eval()
    x = torch.randn(4, 1, 12)
    assert torch.equal(layer(x), layer(x))
    assert get_load_balancing_loss() == []
    layer.train()
    assert not torch.equal(layer(x), layer(x))


class Blocks(torch.nn.Module):
    """Two blocks, perhaps with activation checkpointing. A norm needs the layer's recompute."""

    def __init__(self, args, recomputed):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(dMoE(args), torch.nn.LayerNorm(12)) for _ in range(2)
        )
        self.recomputed = recomputed

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x))
        return x


def losses_and_gradients(model, args, x, parameters):
    """Run backward twice, as a script may. Nothing is saved in it."""
    y = model(x)
    saved = get_load_balancing_loss()
    assert len(saved) == 2
    loss = (y.square().sum() + batched_load_balancing_loss(args)) + batched_router_zloss(args).sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert len(saved) == len(batched_router_zloss(args)) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    clear_load_balancing_loss()
    clear_router_zloss()
    return loss, *first


@pytest.mark.parametrize("compiled", ["none", "model", "blocks"])
def test_a_recompute_saves_nothing(compiled):
    args = arguments(num_layers=2, moe_zloss_weight=0.1)
    x = torch.randn(6, 1, 12)
    plain = Blocks(args, recomputed=False)
    want = losses_and_gradients(plain, args, x, list(plain.parameters()))
    model = Blocks(args, recomputed=True)
    parameters = list(model.parameters())
    if compiled == "blocks":
        model.blocks = torch.nn.ModuleList(
            torch.compile(block, backend="aot_eager") for block in model.blocks
        )
    run = torch.compile(model, backend="aot_eager") if compiled == "model" else model
    for have, gradient in zip(losses_and_gradients(run, args, x, parameters), want):
        assert error(have, gradient) < 1e-5


def test_losses_without_a_gradient_are_warned_of():
    args = arguments()
    x = torch.randn(4, 1, 12, requires_grad=True)
    checkpoint(dMoE(args), x, use_reentrant=True)
    with pytest.warns(UserWarning, match="no gradient for a router.* set use_reentrant=False"):
        batched_load_balancing_loss(args)


def test_a_layer_that_was_used_can_be_copied_and_pickled():
    layer = MoE(arguments()).eval()
    x = torch.randn(4, 1, 12)
    y = layer(x)
    for module in (layer.router, layer.experts.mlp):
        module._parts._parts["lock"] = threading.Lock()  # as backends may hold
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)  # noqa: S301


def test_parameters_of_experts_are_marked():
    layer = dMoE(arguments(mlp_type="glu"))
    marked = [name for name, p in layer.named_parameters() if mpu.is_moe_param(p)]
    assert marked == ["experts.mlp.w1", "experts.mlp.w2", "experts.mlp.v1"]
    assert not mpu.param_is_expert_model_parallel(layer.experts.mlp.w1)
    assert mpu.experts_per_rank(layer.router.args) == 4


def test_states_are_saved_and_loaded_bit_for_bit(tmp_path):
    """Names and shapes are MegaBlocks'."""
    layer = dMoE(arguments(mlp_type="glu", shared_expert=True))
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items() if "shared" not in name} == {
        "router.layer.weight": (4, 12),
        "experts.bias": (12,),
        **{f"experts.mlp.{name}": (80, 12) for name in ("w1", "v1", "w2")},
    }
    save_file(state, tmp_path / "layer.safetensors")
    other = dMoE(arguments(mlp_type="glu", shared_expert=True))
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in state.items())
    capacity = {name: tuple(t.shape) for name, t in MoE(arguments()).state_dict().items()}
    assert capacity["experts.mlp.w1"] == (4, 12, 20)
    assert capacity["experts.mlp.w2"] == (4, 20, 12)


SCRIPT = """
import json
import torch
from megablocks.layers.arguments import Arguments
from megablocks.layers.dmoe import dMoE
from megablocks.layers.moe import batched_load_balancing_loss, clear_load_balancing_loss

torch.manual_seed(3)
args = Arguments(
    hidden_size=12, ffn_hidden_size=20, moe_num_experts=4, moe_top_k=2, mlp_type="glu",
    activation_fn=torch.nn.functional.silu, moe_normalize_expert_weights=1, bias=False,
    fp16=False, device="cpu", moe_loss_weight=0.05,
)
layer = dMoE(args)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
losses = []
for _ in range(5):
    x = torch.randn(7, 2, 12)
    loss = (layer(x) - x.flip(-1)).square().mean() + batched_load_balancing_loss(args)
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    clear_load_balancing_loss()
print(json.dumps(losses))
"""


def own_losses() -> list[float]:
    """The losses of the script, by tokenyard's own layer with the same weights."""
    rule = tokenyard.RoutingRule(normalize=1)
    workload = Workload(12, 20, 4, 2, activation="swiglu", router=rule)
    layer = tokenyard.MoE(workload)
    torch.manual_seed(3)
    theirs = dMoE(
        Arguments(**SIZES, mlp_type="glu", activation_fn=F.silu, fp16=False, device="cpu")
    )
    w1, v1, w2 = (
        getattr(theirs.experts.mlp, name).detach().view(4, 20, 12) for name in ("w1", "v1", "w2")
    )
    with torch.no_grad():
        layer.router.weight.copy_(theirs.router.layer.weight)
        layer.experts.up.copy_(torch.cat([w1, v1], 1))
        layer.experts.down.copy_(w2.mT)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        x = torch.randn(7, 2, 12)
        y, routing = layer(x)
        balance = tokenyard.load_balancing_loss([layer.router.balance(routing)], 14, 2)
        loss = (y - x.flip(-1)).square().mean() + 0.05 * balance
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_a_script_for_megablocks_gives_the_losses_of_our_own_layer(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "tokenyard_models.megablocks", str(script)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    losses = json.loads(said.stdout)
    assert losses == pytest.approx(own_losses(), rel=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("argument", "said"), [([], "usage:"), (["no.py"], "no.py is no file")])
def test_a_command_without_a_script(monkeypatch, argument, said):
    monkeypatch.setattr(sys, "argv", ["megablocks", *argument])
    with pytest.raises(SystemExit, match=said):
        main()


def test_without_the_command_megablocks_is_not_there():
    code = textwrap.dedent("""
        import tokenyard, tokenyard_models, importlib.util
        assert importlib.util.find_spec("megablocks") is None
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
