"""Write the folders beside this file. Needs mosaicml-streaming (0.13.0 wrote the committed ones).

python make.py
"""

from pathlib import Path

import numpy as np
from streaming import MDSWriter
from streaming.base.util import merge_index

HERE = Path(__file__).parent
TEXTS = [f"text {i}: " + "ü✓ " * (i % 5) for i in range(12)]
HASHES = ["sha1", "xxh64"]


def write(name, columns, samples, size_limit=480, **options):
    """Write samples into a folder of small shards."""
    with MDSWriter(
        out=str(HERE / name), columns=columns, size_limit=size_limit, **options
    ) as writer:
        for sample in samples:
            writer.write(sample)


if __name__ == "__main__":
    ids = np.arange(96, dtype=np.int32).reshape(12, 8)
    texts = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    write("text", {"text": "str", "n": "int"}, texts, hashes=HASHES)
    write("text-zstd", {"text": "str", "n": "int"}, texts, hashes=HASHES, compression="zstd:7")
    write("text-gz", {"text": "str", "n": "int"}, texts, compression="gz")
    write("ids-ndarray", {"tokens": "ndarray:int32"}, [{"tokens": row} for row in ids])
    write("ids-shaped", {"tokens": "ndarray:int32:8"}, [{"tokens": row} for row in ids])
    rows = [{"name": f"doc{i}", "tokens": row.tobytes()} for i, row in enumerate(ids)]
    write("ids-bytes", {"name": "str", "tokens": "bytes"}, rows, hashes=HASHES)
    for part in ("a", "b"):
        half = texts[:6] if part == "a" else texts[6:]
        write(f"merged/{part}", {"text": "str", "n": "int"}, half, hashes=["sha1"])
    merge_index(str(HERE / "merged"))
