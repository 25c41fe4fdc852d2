"""What the package offers, where, and how it declines."""

import subprocess
import sys

import pytest
import torch

from tokenyard import RoutingRule, Workload, default_registry
from tokenyard_kernels_cuda import _plugin

CUDA = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16}


def workload(**changes) -> Workload:
    return Workload(**{"dim": 64, "ffn_dim": 128, "num_experts": 8, "top_k": 2} | CUDA | changes)


def test_importing_it_imports_nothing_of_cuda_bindings():
    """Nor do the backends themselves, before a kernel is launched; torch does, for purposes of its own."""
    ours = "tokenyard_kernels_cuda._plugin, tokenyard_kernels_cuda.permutation, tokenyard_kernels_cuda.router"
    code = f"""
import sys, torch
before = set(sys.modules)
import {ours}
assert not [name for name in set(sys.modules) - before if name.partition(".")[0] == "cuda"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def installed(monkeypatch):
    """torch for CUDA 13, and cuda-bindings of it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_plugin, "_version", lambda name: "13.0.3")


def test_everything_is_usable_on_a_gpu(installed):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert _plugin.no_permutation(workload(dtype=dtype, capability=(8, 0))) is None
        assert _plugin.no_router(workload(dtype=dtype, num_experts=1024)) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"device": "cpu", "capability": None},
            "'cuda' computes on a GPU, and the device is 'cpu'",
        ),
        (
            {"dtype": torch.float64},
            "'cuda' computes in bfloat16, float16 and float32, not in float64",
        ),
        (
            {"capability": (7, 5)},
            "'cuda' needs a GPU of compute capability 8.0 or later, and this is 7.5",
        ),
    ],
)
def test_what_it_cannot_do_is_said(installed, changes, sentence):
    assert _plugin.no_permutation(workload(**changes)) == sentence
    assert _plugin.no_router(workload(**changes)) == sentence


def test_without_cuda_bindings_it_says_what_would_bring_it(monkeypatch):
    monkeypatch.setattr(_plugin, "_version", lambda name: None)
    assert _plugin.no_permutation(workload()).startswith(
        "'cuda' needs cuda-bindings, which comes with torch's CUDA"
    )
    assert _plugin.no_router(workload()).endswith("pip install cuda-bindings")


def test_bindings_of_another_cuda_than_torch_s_are_refused(installed, monkeypatch):
    """They would look for a compiler that torch did not bring."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _plugin.no_router(workload()) == (
        "'cuda' needs cuda-bindings for CUDA 12.8, as torch is built for it, and 13.0.3 is installed; "
        'pip install "cuda-bindings==12.*"'
    )


def test_on_amd_s_gpus_it_says_whose_it_is_for(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in _plugin.no_permutation(workload())


def test_how_many_experts():
    from tokenyard_kernels_cuda.ops import _plan, _topk

    most = {"experts": _plan.MOST_EXPERTS + 1, "routed": _topk.MOST_EXPERTS + 1}
    assert f"at most {_plan.MOST_EXPERTS} experts" in _plugin.no_permutation(
        workload(num_experts=most["experts"])
    )
    assert f"at most {_topk.MOST_EXPERTS} experts" in _plugin.no_router(
        workload(num_experts=most["routed"])
    )


def test_a_router_of_another_algorithm_is_left_to_others():
    assert "'expert_choice'" in _plugin.no_router(
        workload(router=RoutingRule(algorithm="expert_choice"))
    )


def test_a_score_that_a_later_core_may_have_is_left_to_others():
    rule = RoutingRule()
    object.__setattr__(rule, "score", "softplus")
    assert "softmax, sigmoid, not 'softplus'" in _plugin.no_router(workload(router=rule))


@pytest.mark.parametrize("kind", ["permutation", "router"])
def test_auto_takes_it_on_a_gpu_and_nowhere_else(installed, kind):
    registry = default_registry()
    assert registry.choose(kind, "auto", workload()).backend.name == "cuda"
    assert (
        registry.choose(kind, "auto", workload(device="cpu", capability=None)).backend.name
        != "cuda"
    )
