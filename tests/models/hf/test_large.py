"""Loading takes little more memory than the model."""

import json
import subprocess
import sys

import pytest

from tokenyard_models import Mixtral, to_hf

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
SIZES |= {"num_key_value_heads": 4, "num_local_experts": 14, "num_experts_per_tok": 2, "vocab_size": 8000}

LOAD = """
import json, sys, time
from pathlib import Path
from tokenyard_models import from_hf

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

before, began = peak(), time.perf_counter()
model = from_hf(sys.argv[1])
seconds, after = time.perf_counter() - began, peak()
print(json.dumps({"held": sum(p.nbytes for p in model.parameters()), "peak": after - before, "seconds": seconds}))
"""


@pytest.mark.full
def test_loading_four_gigabytes_takes_little_more(tmp_path):
    """In shards of 1 GB; the most memory that the process had, mapped files included, above what the imports take."""
    to_hf(Mixtral(SIZES), tmp_path / "model", shard_bytes=10**9)
    program = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "model")], check=True, capture_output=True)
    found = json.loads(program.stdout)
    times = found["peak"] / found["held"]
    print(f"\n{times:.3f} times the model's {found['held'] / 1e9:.2f} GB, {found['seconds']:.0f} s")
    assert found["held"] > 4e9
    assert found["peak"] < 1.2 * found["held"]
