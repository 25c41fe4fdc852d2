"""A resolved device always names its card."""

import pytest
import torch

from tokenyard import ConfigError, Workload, resolve_device
from tokenyard.devices import with_index


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("auto", "cuda:0"),
        ("cuda", "cuda:0"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("cpu", "cpu"),
    ],
)
def test_every_name_becomes_one_card(two_gpus, name, card):
    assert str(resolve_device(name)) == card
    assert str(resolve_device(torch.device(card))) == card
    if name != "auto":
        assert str(Workload(8, 8, 2, 1, device=name).device) == card


def test_a_rank_takes_the_card_of_its_number(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(resolve_device("auto")) == "cuda:1"
    assert str(resolve_device("cuda:0")) == "cuda:0"


def test_a_rank_that_sees_only_its_own_card_takes_that(two_gpus, monkeypatch):
    """Slurm and one CUDA_VISIBLE_DEVICES a rank: its number says nothing here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(resolve_device("auto")) == "cuda:0"
    assert str(Workload(8, 8, 2, 1, device="cuda").device) == "cuda:0"


def test_a_workload_s_device_is_what_tensors_report():
    """Which for a processor has no index."""
    assert Workload(8, 8, 2, 1, device="cpu:0").device == torch.zeros(1, device="cpu:0").device


def test_torch_s_current_card_counts_where_there_is_one(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert str(with_index("cuda")) == "cuda:1"


def test_wrong_names_are_one_sentence(two_gpus, monkeypatch):
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


def test_without_a_gpu_auto_is_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"
    assert (
        Workload(8, 8, 2, 1, device="cuda", capability=(9, 0)).device.index == 0
    )  # planned for, on a laptop
