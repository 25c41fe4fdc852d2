"""The backends that the package offers, and the reasons why it declines a workload."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenyard import Workload, default_registry
from tokenyard.registry import Registry, installed_plugins
from tokenyard_kernels_triton import _plugin
from tokenyard_kernels_triton.experts import GluonExperts
from tokenyard_kernels_triton.fp8_advice import _FASTER

CUDA = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16}


def workload(**changes) -> Workload:
    return Workload(**{"dim": 64, "ffn_dim": 128, "num_experts": 8, "top_k": 2} | CUDA | changes)


def test_importing_it_imports_no_triton():
    code = "import sys, tokenyard_kernels_triton._plugin; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_everything_is_usable_on_hopper():
    assert _plugin.no_triton(workload()) is None
    assert _plugin.no_router(workload()) is None


def test_gluon_in_fp8_is_planned_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_plugin, "triton_minor_version", lambda: "3.6")
    planned = workload(dim=128, capability=None)
    request = {"name": "gluon", "precision": "fp8"}
    kernel = default_registry().choose("experts", request, planned).construct(planned, None)
    assert kernel.weight_copy_bytes(128 * 128) == 2 * 128 * 128 + 4
    assert kernel.advice(True) is None


def test_gluon_says_what_fp8_would_gain_and_save():
    qwen = workload(dim=2048, ffn_dim=768, num_experts=128, top_k=8)
    assert GluonExperts(qwen, None).advice(True) == (
        "precision: fp8 saves 11,904 bytes fewer a token and layer, takes 2 bytes a weight for "
        "copies, and made a layer of F 768 1.20 times as fast on one H200"
    )
    assert "bytes fewer" not in GluonExperts(qwen, None, save="fp8").advice(True)
    assert "rounds weights in each pass, and made" in GluonExperts(qwen, None).advice(False)
    assert GluonExperts(workload(dim=64), None).advice(True) is None


def test_its_gains_are_those_of_the_benchmark():
    root = Path(__file__).parents[2]
    path = root / "docs" / "benchmarks" / "h200" / "layer-fp8.json"
    gains: dict[int, list[float]] = {}
    steps = {}
    for record in json.loads(path.read_text())["records"]:
        if record["note"] is None:
            steps[record["contestant"]] = record["step_ms"]["median"]
        if record["contestant"] == "gluon:precision=fp8":
            gain = steps["gluon"] / steps["gluon:precision=fp8"]
            gains.setdefault(record["shape"]["ffn_dim"], []).append(round(gain, 2))
    assert {width: min(each) for width, each in gains.items()} == _FASTER


def test_gluon_needs_hopper_and_a_known_triton_version(monkeypatch):
    monkeypatch.setattr(_plugin, "triton_minor_version", lambda: "3.6")
    assert _plugin.no_gluon(workload()) is None
    assert "Hopper" in _plugin.no_gluon(workload(capability=(8, 0)))
    assert "float32" in _plugin.no_gluon(workload(dtype=torch.float32))
    assert "ffn_dim is 132, not a multiple of 8" in _plugin.no_gluon(workload(ffn_dim=132))
    monkeypatch.setattr(_plugin, "triton_minor_version", lambda: "4.0")
    assert _plugin.no_gluon(workload()).endswith("3.9, and 4.0 is installed")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "Hopper" in _plugin.no_gluon(workload())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"dtype": torch.float64},
            "'triton' computes in bfloat16, float16 and float32, not in float64",
        ),
        (
            {"capability": (7, 5)},
            "'triton' needs a GPU of compute capability 8.0 or later, and this is 7.5",
        ),
    ],
)
def test_unsupported_workloads_have_a_reason(changes, sentence):
    assert _plugin.no_triton(workload(**changes)) == sentence


def test_without_a_gpu_it_declines(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sentence = _plugin.no_triton(workload(device="cpu", capability=None))
    assert sentence.startswith("'triton' computes on a GPU, and the device is 'cpu'")


def test_without_triton_it_declines(monkeypatch):
    monkeypatch.setattr(_plugin.importlib.util, "find_spec", lambda name: None)
    assert "is not installed" in _plugin.no_triton(workload())


def test_auto_never_selects_the_interpreter():
    chosen = default_registry().choose("experts", "auto", workload(device="cpu", capability=None))
    assert chosen.backend.name == "cpu"


def test_rows_are_packed_by_a_kernel_where_triton_knows_e4m3(monkeypatch):
    def has_kernel(capability, dtype=torch.bfloat16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return _plugin._has_packing_kernel(torch.device("cuda"), dtype)

    assert has_kernel((9, 0))
    assert has_kernel((8, 9))
    assert not has_kernel((8, 0))
    assert not has_kernel((9, 0), torch.float64)


def test_symmetric_memory_needs_ranks_of_one_node_with_peer_access(monkeypatch):
    for name in ("TRITON_INTERPRET", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    two = workload(device="cuda:3", expert_parallel=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda index, peer: peer == 2)
    assert _plugin.no_symmetric_memory(two) is None
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda index, peer: False)
    assert _plugin.no_symmetric_memory(two).endswith("needs GPU 3 to read the memory of GPU 2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert _plugin.no_symmetric_memory(two).endswith("LOCAL_WORLD_SIZE is not set")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    sentence = "'symmetric_memory' needs the 2 ranks that share experts on one node, and LOCAL"
    assert _plugin.no_symmetric_memory(two).startswith(sentence)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _plugin.no_symmetric_memory(two).endswith("the first rank of this node is 1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK")  # a launcher that sets none: rank 0 accepts it as well
    assert _plugin.no_symmetric_memory(two).endswith("the memory of GPU 2")
    on_cpu = workload(device="cpu", capability=None, expert_parallel=2)
    assert _plugin.no_symmetric_memory(on_cpu).endswith("the device is 'cpu'")
    old = workload(device="cuda:3", capability=(7, 0), expert_parallel=2)
    assert _plugin.no_symmetric_memory(old).endswith("8.0 or later, and this is 7.0")


@pytest.mark.parametrize(
    ("ranks", "on_node", "name"),
    [(1, 2, "local"), (2, 2, "symmetric_memory"), (4, 2, "all_to_all_tokens")],
)
def test_auto_selects_symmetric_memory_for_ranks_of_one_node(monkeypatch, ranks, on_node, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda index, peer: True)
    registry = Registry(*installed_plugins())  # priorities without the interpreter
    chosen = registry.choose("exchange", "auto", workload(device="cuda:0", expert_parallel=ranks))
    assert chosen.backend.name == name


def test_auto_passes_over_symmetric_memory_if_each_rank_sees_its_own_gpu_only(monkeypatch):
    """torch shares no memory between GPUs of the same index, here 0 in every rank."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    two = workload(device="cuda:0", expert_parallel=2)
    chosen = Registry(*installed_plugins()).choose("exchange", "auto", two)
    assert chosen.backend.name == "all_to_all_tokens"
    assert chosen.passed_over["symmetric_memory"] == (
        "'symmetric_memory' needs each rank to see the GPUs of the 2 ranks that share experts, and "
        "torch finds 1 here (CUDA_VISIBLE_DEVICES)"
    )


def test_the_router_computes_topk_for_up_to_1024_experts():
    (router,) = _plugin.tokenyard_routers()
    assert router.algorithm == "topk"
    assert "at most 1024" in _plugin.no_router(workload(num_experts=2048))


def test_an_unknown_router_score_is_declined():
    from tokenyard import RoutingRule

    rule = RoutingRule()
    object.__setattr__(rule, "score", "softplus")
    assert "softmax, sigmoid, not 'softplus'" in _plugin.no_router(workload(router=rule))
