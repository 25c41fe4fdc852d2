"""Names of activations, and the options of SwiGLU that a name can hold."""

import math

import pytest
import torch

from tokenyard import ConfigError, SwigluOptions, Workload, activate, swiglu, swiglu_options
from tokenyard.activations import ACTIVATIONS, activate_with_pullback
from tokenyard.tolerance import relative_error

GPT_OSS = swiglu(alpha=1.702, limit=7, offset=1)


def test_a_name_holds_its_options():
    assert swiglu() == "swiglu"
    assert GPT_OSS == "swiglu(alpha=1.702, limit=7.0, offset=1.0)"
    assert swiglu_options(GPT_OSS) == SwigluOptions(1.702, 7.0, 1.0)
    assert swiglu_options("swiglu(limit=7)") == SwigluOptions(limit=7.0)
    assert swiglu_options("swiglu") == SwigluOptions(1.0, math.inf, 0.0)


@pytest.mark.parametrize(
    ("activation", "sentence"),
    [
        ("swiglu(limt=7)", r"option 'limt' is unknown \(did you mean 'limit'\?\)"),
        ("swiglu(limit=seven)", "'seven' is not a number; write options as in swiglu"),
        ("swiglu(limit)", "'' is not a number"),
        ("swiglu(limit=0)", "limit must be above 0"),
        ("swiglu(alpha=nan)", "alpha must be above 0"),
        ("geglu(limit=7)", "geglu has no options; swiglu has some"),
        ("swigl(limit=7)", r"activation 'swigl' is unknown \(did you mean 'swiglu'"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(activation, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Workload(8, 8, 2, 1, activation)


def test_gpt_oss_s_definition():
    z = torch.randn(50, 12, dtype=torch.float64) * 5
    gate, up = z.chunk(2, -1)
    gate = gate.clamp(max=7)
    expected = (up.clamp(-7, 7) + 1) * (gate * torch.sigmoid(gate * 1.702))
    assert relative_error(activate(z, GPT_OSS), expected) < 1e-15


def test_options_without_effect_change_nothing():
    z = torch.randn(50, 12, dtype=torch.float64)
    assert relative_error(activate(z, "swiglu(limit=1e9)"), activate(z, "swiglu")) < 1e-15


def test_nan_stays_nan():
    z = torch.tensor([[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0]])
    assert activate(z, GPT_OSS).isnan().flatten().tolist() == [True, True, False]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu(limit=0.5)", swiglu(1.7, 0.5, 1)])
def test_the_pullback_is_autograd_s(activation):
    z = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    da = torch.randn_like(activate(z, activation))
    (expected,) = torch.autograd.grad(activate(z, activation), z, da)
    a, pullback = activate_with_pullback(z.detach(), activation)
    assert relative_error(a, activate(z, activation)) < 1e-15
    assert relative_error(pullback(da), expected) < 1e-14
