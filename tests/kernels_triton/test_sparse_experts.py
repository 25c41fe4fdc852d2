"""Experts of different widths in one layer."""

import pytest
import torch

from tokenyard import BackendError, ConfigError, MoE, Workload, default_registry
from tokenyard.tolerance import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (64, 192, 128)


def workload(**changes) -> Workload:
    sizes = {"dim": 24, "ffn_dim": 192, "num_experts": 3, "top_k": 2, "ffn_dims": WIDTHS}
    return Workload(**(sizes | {"device": torch.device(DEVICE)} | changes))


def cut(weights: torch.Tensor, widths: tuple[int, ...], parts: int, dim: int) -> torch.Tensor:
    """Return packed weights that are zero past each expert's width."""
    weights = weights.clone()
    for expert, width in enumerate(widths):
        view = weights[expert].unflatten(dim, (parts, -1))
        view.narrow(dim + 1, width, view.shape[dim + 1] - width).zero_()
    return weights


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_narrow_experts_are_wide_ones_with_zeros(activation):
    """The same output and gradients; what lies past a width has a zero gradient."""
    parts = 2 if activation == "swiglu" else 1
    torch.manual_seed(2)
    narrow = MoE(workload(activation=activation))
    assert narrow.chosen["experts"].backend.name == "sparse"
    wide = MoE(workload(activation=activation, ffn_dims=None), backends={"experts": "torch"})
    wide.load_state_dict(narrow.state_dict())
    wide.experts.up.data = cut(wide.experts.up.data, WIDTHS, parts, 0)
    wide.experts.down.data = cut(wide.experts.down.data, WIDTHS, 1, 1)
    x = torch.randn(40, 24, device=DEVICE)
    results = []
    for layer in (narrow, wide):
        y, _ = layer(x)
        y.square().sum().backward()
        results.append([y, layer.router.weight.grad])
    for got, want in zip(*results):
        assert relative_error(got, want) < 1e-5
    up = narrow.experts.up.grad
    down = narrow.experts.down.grad
    assert torch.equal(up, cut(up, WIDTHS, parts, 0))
    assert torch.equal(down, cut(down, WIDTHS, 1, 1))
    assert relative_error(up, cut(wide.experts.up.grad, WIDTHS, parts, 0)) < 1e-5
    assert relative_error(down, cut(wide.experts.down.grad, WIDTHS, 1, 1)) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "loop", "triton"])
def test_other_backends_refuse_several_widths(backend):
    sentence = f"'{backend}' computes experts of one width; leave out ffn_dims"
    with pytest.raises(BackendError, match=sentence):
        MoE(workload(), backends={"experts": backend})


@pytest.mark.parametrize("widths", [(64, 128), (64, 64, 128), (0, 192, 64)])
def test_widths_that_do_not_fit_are_named(widths):
    with pytest.raises(ConfigError, match="give 3 widths, one for each expert"):
        workload(ffn_dims=widths)


def test_several_widths_are_for_one_rank():
    with pytest.raises(ConfigError, match="expert_parallel is 3; set it to 1"):
        workload(expert_parallel=3)


def test_it_is_selected_by_name_only():
    chosen = default_registry().choose("experts", "auto", workload(ffn_dims=None))
    assert chosen.backend.name != "sparse"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bias": True}, "'sparse' has no biases of experts"),
        ({"ffn_dim": 200, "ffn_dims": None}, "200 is not a multiple of 64"),
        ({"dtype": torch.float64}, "'sparse' computes in bfloat16, float16 and float32, not in"),
    ],
)
def test_what_it_does_not_compute_is_one_sentence(changes, sentence):
    with pytest.raises(BackendError, match=sentence):
        MoE(workload(**changes), backends={"experts": "sparse"})
