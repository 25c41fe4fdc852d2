"""`bench layer --held`: what is refused, and the table; without a GPU."""

import io
import logging
from functools import partial

import pytest
import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.measure.timing import CpuClock, clock_for
from tokenyard_bench import held
from tokenyard_bench.tables.layer import print_layers

from .test_layer import run


def test_multiprocessors_are_held_on_a_gpu_only():
    with pytest.raises(ConfigError, match="--held is for a GPU, and --device is 'cpu'; leave"):
        held.check_held(8, torch.device("cpu"))


def test_some_multiprocessors_must_be_left(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(held, "find_spec", lambda name: name)
    held.check_held(131, torch.device("cuda"))
    with pytest.raises(ConfigError, match="has 132 multiprocessors; give at most 131"):
        held.check_held(132, torch.device("cuda"))


def test_the_kernel_is_for_gpus_of_nvidia(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(
        ConfigError, match="--held is for NVIDIA GPUs, and this torch is for AMD GPUs"
    ):
        held.check_held(8, torch.device("cuda"))


def test_triton_is_needed(monkeypatch):
    monkeypatch.setattr(held, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--held needs triton, which is not installed"):
        held.check_held(8, torch.device("cuda"))


class CpuHeldClock(CpuClock):
    """A clock of the CPU in place of a GPU's."""

    def __init__(self, device, multiprocessors):
        pass

    def ran_out(self):
        return False


def test_times_beside_the_kernel_have_a_table(monkeypatch):
    monkeypatch.setattr(held, "IdleClock", clock_for)
    monkeypatch.setattr(held, "HeldClock", CpuHeldClock)
    records = run(held=partial(held.held_times, multiprocessors=16))
    for name in ("cpu", "torch"):
        assert records[name]["multiprocessors_held"] == 16
        for kind in ("free", "held"):
            assert 0 < records[name][kind]["forward"] < records[name][kind]["step"]
    out = io.StringIO()
    print_layers(list(records.values()), Console(file=out, width=160))
    printed = " ".join(out.getvalue().split())
    assert "free, and with 16 multiprocessors held" in printed
    assert "held fwd+bwd" in printed


def test_a_layer_that_waits_for_the_kernel_is_left_out(monkeypatch, caplog):
    """The others, and all other times of that layer, are kept."""
    clocks = []

    class Clock(CpuHeldClock):
        """Ends early for the second layer."""

        def prepare(self, call):
            super().prepare(call)
            clocks.append(call)

        def ran_out(self):
            return len(clocks) == 2

    monkeypatch.setattr(held, "IdleClock", clock_for)
    monkeypatch.setattr(held, "HeldClock", Clock)
    with caplog.at_level(logging.WARNING, "tokenyard"):
        records = run(held=partial(held.held_times, multiprocessors=16))
    first, second = (name for name in records if name != "dense")
    assert "held" in records[first]
    assert "held" not in records[second]
    assert records[second]["efficiency"] > 0
    assert caplog.messages == [
        f"{second} waited for all streams of the GPU, or took longer than 2 s, "
        "so --held does not time it"
    ]
