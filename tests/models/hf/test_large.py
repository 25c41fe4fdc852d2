"""Loading takes little more memory than the model, and upcycling no more than a shard and a layer's experts."""

import json
import subprocess
import sys

import pytest

from tokenyard_models import Llama, Mixtral, to_hf

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
}
SIZES |= {
    "num_key_value_heads": 4,
    "num_local_experts": 14,
    "num_experts_per_tok": 2,
    "vocab_size": 8000,
}

DENSE = {name: value for name, value in SIZES.items() if "experts" not in name}

PEAK = """
import json, sys, time
from pathlib import Path
from tokenyard_models import Upcycling, from_hf, upcycle

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
LOAD = """
before, began = peak(), time.perf_counter()
model = from_hf(sys.argv[1])
seconds, after = time.perf_counter() - began, peak()
print(json.dumps({"held": sum(p.nbytes for p in model.parameters()), "peak": after - before, "seconds": seconds}))
"""
UPCYCLE = """
before = peak()
model = upcycle(sys.argv[1], sys.argv[2], Upcycling(8, 2), shard_bytes=5 * 10**8)
largest = max(p.nbytes for p in model.parameters())
print(json.dumps({"written": sum(p.nbytes for p in model.parameters()), "largest": largest, "peak": peak() - before}))
"""


def ran(code, *arguments):
    """Run a program of its own; return what it found."""
    command = [sys.executable, "-c", PEAK + code, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.full
def test_loading_four_gigabytes_takes_little_more(tmp_path):
    """In shards of 1 GB; the most memory that the process had, mapped files included, above what the imports take."""
    to_hf(Mixtral(SIZES), tmp_path / "model", shard_bytes=10**9)
    found = ran(LOAD, tmp_path / "model")
    times = found["peak"] / found["held"]
    print(f"\n{times:.3f} times the model's {found['held'] / 1e9:.2f} GB, {found['seconds']:.0f} s")
    assert found["held"] > 4e9
    assert found["peak"] < 1.2 * found["held"]


@pytest.mark.full
def test_upcycling_holds_a_shard_and_a_parameter_or_two(tmp_path):
    """Of 2.5 GB, in shards of 0.5 GB, which safetensors holds twice: as tensors and as bytes."""
    to_hf(Llama(DENSE), tmp_path / "dense")
    found = ran(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    print(f"\n{found['peak'] / 1e9:.2f} GB to write {found['written'] / 1e9:.2f} GB")
    assert found["written"] > 2e9
    assert found["peak"] < 2 * 5e8 + 3 * found["largest"] + 1e8
