"""`bench layer --held`: what is refused, and the table; without a GPU."""

import io
from functools import partial

import pytest
import torch
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.measure.timing import clock_for
from tokenyard_bench import held
from tokenyard_bench.tables.layer import print_layers

from .test_layer import run


def test_multiprocessors_are_held_on_a_gpu_only():
    with pytest.raises(ConfigError, match="--held is for a GPU, and --device is 'cpu'"):
        held.check_held(8, torch.device("cpu"))


def test_some_multiprocessors_must_be_left(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(held, "find_spec", lambda name: name)
    held.check_held(131, torch.device("cuda"))
    with pytest.raises(ConfigError, match="--held is 132, and the GPU has 132 multiprocessors"):
        held.check_held(132, torch.device("cuda"))


def test_triton_is_needed(monkeypatch):
    monkeypatch.setattr(held, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--held needs triton, which is not installed"):
        held.check_held(8, torch.device("cuda"))


def test_times_beside_the_kernel_have_a_table(monkeypatch):
    """Clocks of the CPU stand in for those of a GPU."""
    monkeypatch.setattr(held, "IdleClock", clock_for)
    monkeypatch.setattr(held, "HeldClock", lambda device, count: clock_for(device))
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
