"""Peak memory: loading needs little more than the model, upcycling a shard and a layer."""

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
before = peak()
began = time.perf_counter()
model = from_hf(sys.argv[1])
seconds = time.perf_counter() - began
after = peak()
size = sum(p.nbytes for p in model.parameters())
print(json.dumps({"held": size, "peak": after - before, "seconds": seconds}))
"""
UPCYCLE = """
before = peak()
model = upcycle(sys.argv[1], sys.argv[2], Upcycling(8, 2), shard_bytes=5 * 10**8)
largest = max(p.nbytes for p in model.parameters())
written = sum(p.nbytes for p in model.parameters())
print(json.dumps({"written": written, "largest": largest, "peak": peak() - before}))
"""


def ran(code, *arguments):
    """Run code in a new process and return its JSON output."""
    command = [sys.executable, "-c", PEAK + code, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.full
def test_loading_four_gigabytes_takes_little_more(tmp_path):
    """Compare the peak above the imports, mapped files included, in shards of 1 GB."""
    to_hf(Mixtral(SIZES), tmp_path / "model", shard_bytes=10**9)
    result = ran(LOAD, tmp_path / "model")
    times = result["peak"] / result["held"]
    print(
        f"\n{times:.3f} times the model's {result['held'] / 1e9:.2f} GB, {result['seconds']:.0f} s"
    )
    assert result["held"] > 4e9
    assert result["peak"] < 1.2 * result["held"]


@pytest.mark.full
def test_upcycling_holds_a_shard_and_a_parameter_or_two(tmp_path):
    """Write 2.5 GB in shards of 0.5 GB; safetensors holds a shard twice."""
    to_hf(Llama(DENSE), tmp_path / "dense")
    result = ran(UPCYCLE, tmp_path / "dense", tmp_path / "moe")
    print(f"\n{result['peak'] / 1e9:.2f} GB to write {result['written'] / 1e9:.2f} GB")
    assert result["written"] > 2e9
    assert result["peak"] < 2 * 5e8 + 3 * result["largest"] + 1e8
