"""Pack a gigabyte of text and read it back: speed and memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenyard_train.data import Samples, TokenFile, python_stdlib

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A gigabyte of the standard library's text as jsonl; a first line makes each text unique."""
    path = tmp_path_factory.mktemp("large") / "text.jsonl"
    documents = [document.text.decode() for document in python_stdlib(held_out=False)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < GIGABYTE:
            line = f"# copy {number}\n" + documents[number % len(documents)]
            file.write(json.dumps({"text": line}) + "\n")
            written += len(line.encode())
            number += 1
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 32,000 ids, trained on the standard library."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator((d.text.decode() for d in python_stdlib(held_out=False)), trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


_MEASURED = """
import resource, sys
from pathlib import Path
from tokenyard_cli import app
try:
    app(sys.argv[1:])
finally:
    # A forked process inherits ru_maxrss from its parent, so read VmHWM instead.
    status = Path("/proc/self/status").read_text().splitlines()
    main = next(int(line.split()[1]) for line in status if "VmHWM" in line) / 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory: {main:.0f} MiB in the main process, {worker:.0f} MiB in one worker")
"""


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_packing_and_reading_a_gigabyte(tmp_path, text, bpe, tokenizer):
    workers = os.cpu_count() or 1
    options = [] if tokenizer == "bytes" else ["--tokenizer", str(bpe), "--eos-token", "</s>"]
    script = tmp_path / "measured.py"
    script.write_text("if __name__ == '__main__':" + _MEASURED.replace("\n", "\n    "))
    command = [
        sys.executable,
        str(script),
        "data",
        "pack",
        str(tmp_path / "packed"),
        str(text),
        *options,
    ]
    began = time.perf_counter()
    ran = subprocess.run(
        [*command, "--workers", str(workers)], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    rate = GIGABYTE / 1e6 / seconds
    memory = ran.stdout.splitlines()[-1]
    print(f"\n{tokenizer}: {rate:.1f} MB/s with {workers} workers; {memory}")

    tokens = TokenFile(tmp_path / "packed")
    began = time.perf_counter()
    tokens.verify()
    print(f"verified {tokens.manifest['tokens']:,} tokens in {time.perf_counter() - began:.1f} s")
    for length in (256, 2048):
        samples = Samples(TokenFile(tmp_path / "packed"), length, seed=1)
        began = time.perf_counter()
        read = sum(samples.batch(step, 16).numel() for step in range(400))
        rate = read / (time.perf_counter() - began)
        print(
            f"samples of {length}: {rate / 1e6:.1f} million tokens/s, blocks verified on first read"
        )
        assert rate > 20 * 25_000  # 20 times the quickstart's training throughput
