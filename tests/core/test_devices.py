"""A resolved GPU always has an index."""

import pytest
import torch

from tokenyard import ConfigError, Workload, resolve_device
from tokenyard.devices import peak_memory, with_index


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("auto", "cuda:0"),
        ("cuda", "cuda:0"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("cpu", "cpu"),
    ],
)
def test_every_name_resolves_to_one_device(two_gpus, name, device):
    assert str(resolve_device(name)) == device
    assert str(resolve_device(torch.device(device))) == device
    if name != "auto":
        assert str(Workload(8, 8, 2, 1, device=name).device) == device


def test_the_default_gpu_of_a_rank_is_local_rank(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(resolve_device("auto")) == "cuda:1"
    assert str(resolve_device("cuda:0")) == "cuda:0"


def test_a_rank_that_sees_one_gpu_uses_it(two_gpus, monkeypatch):
    """With one CUDA_VISIBLE_DEVICES per rank, as in Slurm, LOCAL_RANK is no index."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(resolve_device("auto")) == "cuda:0"
    assert str(Workload(8, 8, 2, 1, device="cuda").device) == "cuda:0"


def test_the_device_of_a_workload_is_that_of_its_tensors():
    """The CPU has no index."""
    assert Workload(8, 8, 2, 1, device="cpu:0").device == torch.zeros(1, device="cpu:0").device


def test_the_default_index_is_that_of_the_current_device(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert str(with_index("cuda")) == "cuda:1"


def test_wrong_names_are_refused(two_gpus, monkeypatch):
    for name in ("tpu", "cuda:x", "meta", "cpu:1", "cuda:256"):
        with pytest.raises(
            ConfigError, match=f"--device is '{name}'; give cpu, cuda, cuda:N or auto"
        ):
            resolve_device(name, "--device")
    with pytest.raises(
        ConfigError, match="device is 'cuda:2', but torch finds 2 CUDA GPUs here; count from cuda:0"
    ):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        ConfigError, match="device is 'cuda', but torch finds no CUDA GPU here; give cpu or auto"
    ):
        resolve_device("cuda")
    assert str(resolve_device("cuda:3", planned=True)) == "cuda:3"


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"
    planned = Workload(8, 8, 2, 1, device="cuda", capability=(9, 0))  # for another machine
    assert planned.device.index == 0


@pytest.mark.gpu
def test_the_peak_of_memory_is_that_of_torch():
    device = torch.device("cuda:0")
    torch.empty(1 << 24, device=device)
    assert peak_memory(device) == torch.cuda.max_memory_allocated(device) >= 1 << 26
