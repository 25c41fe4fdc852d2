"""Registration of the backends, and the reasons why they are unusable."""

import subprocess
import sys

import pytest
import torch

from tokenyard import RoutingRule, Workload, default_registry
from tokenyard_kernels_cuda import _plugin

CUDA = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16}


def workload(**changes) -> Workload:
    return Workload(**{"dim": 64, "ffn_dim": 128, "num_experts": 8, "top_k": 2} | CUDA | changes)


def test_import_does_not_import_cuda_bindings():
    """Neither the plugin nor the backends do before a launch. torch itself may import it."""
    code = """
import sys, torch
before = set(sys.modules)
import tokenyard_kernels_cuda._plugin
import tokenyard_kernels_cuda.permutation, tokenyard_kernels_cuda.router
assert not [name for name in set(sys.modules) - before if name.partition(".")[0] == "cuda"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def installed(monkeypatch):
    """Fake torch for CUDA 13 with matching cuda-bindings."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_plugin, "_version", lambda name: "13.0.3")


def test_backends_are_usable_on_a_gpu(installed):
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
def test_unsupported_workload_is_one_sentence(installed, changes, sentence):
    assert _plugin.no_permutation(workload(**changes)) == sentence
    assert _plugin.no_router(workload(**changes)) == sentence


def test_missing_cuda_bindings_name_the_package_to_install(monkeypatch):
    monkeypatch.setattr(_plugin, "_version", lambda name: None)
    assert _plugin.no_permutation(workload()).startswith(
        "'cuda' needs cuda-bindings, which comes with torch's CUDA"
    )
    assert _plugin.no_router(workload()).endswith("pip install cuda-bindings")


def test_cuda_bindings_of_another_cuda_release_are_refused(installed, monkeypatch):
    """They would load an NVRTC that torch does not install."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _plugin.no_router(workload()) == (
        "'cuda' needs cuda-bindings for CUDA 12.8, as torch is built for it, "
        "and 13.0.3 is installed; "
        'pip install "cuda-bindings==12.*"'
    )


@pytest.mark.parametrize("gpu", [True, False])
def test_a_driver_that_cannot_launch_is_refused_unless_another_machine_is_planned(
    installed, monkeypatch, gpu
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(_plugin, "has_driver", lambda: False)
    reasons = [_plugin.no_permutation(workload()), _plugin.no_router(workload())]
    if gpu:
        assert all(reason.startswith("'cuda' cannot launch: kernels are") for reason in reasons)
    else:
        assert reasons == [None, None]


def test_amd_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in _plugin.no_permutation(workload())


def test_limits_of_experts():
    from tokenyard_kernels_cuda.ops import _plan, _topk

    reason = _plugin.no_permutation(workload(num_experts=_plan.MOST_EXPERTS + 1))
    assert f"at most {_plan.MOST_EXPERTS} experts" in reason
    reason = _plugin.no_router(workload(num_experts=_topk.MOST_EXPERTS + 1))
    assert f"at most {_topk.MOST_EXPERTS} experts" in reason


def test_the_router_computes_topk():
    (router,) = _plugin.tokenyard_routers()
    assert router.algorithm == "topk"


def test_unknown_router_scores_are_refused():
    rule = RoutingRule()
    object.__setattr__(rule, "score", "softplus")
    assert "softmax, sigmoid, not 'softplus'" in _plugin.no_router(workload(router=rule))


@pytest.mark.parametrize("kind", ["permutation", "router"])
def test_auto_selects_it_on_gpus_only(installed, kind):
    registry = default_registry()
    assert registry.choose(kind, "auto", workload()).backend.name == "cuda"
    assert (
        registry.choose(kind, "auto", workload(device="cpu", capability=None)).backend.name
        != "cuda"
    )
