"""What `convert` and `upcycle` print while they work, and the modes of the files."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers", minversion="5.14")

from transformers import AutoModelForCausalLM, LlamaConfig

from tokenyard_models import Upcycling, from_hf, to_hf, upcycle
from tokenyard_train.commands.writing import writing_report


def test_convert_says_what_it_reads_and_wrote(tokenyard, trained, tmp_path):
    out = tmp_path / "a-folder-whose-name-is-so-long-that-a-narrow-console-would-break-the-line"
    code, said, errors = tokenyard("convert", str(trained), str(out), "--dtype", "bfloat16")
    assert (code, errors) == (0, "")
    reading, writing, wrote, load = said.splitlines()
    assert reading == f"reading {trained} ..."
    assert writing.startswith(f"writing {out}: ")
    assert writing.endswith(" KiB ...")
    assert wrote.startswith(f"wrote {out}: dbrx, ")
    assert " parameters in bfloat16, " in wrote
    assert wrote.endswith(" KiB")
    assert load == (
        f'load it: transformers.AutoModelForCausalLM.from_pretrained("{out}"), '
        f"or tokenyard generate {out}"
    )


def test_files_are_for_the_readers_of_the_folder(tokenyard, trained, tmp_path):
    tokenyard("convert", str(trained), str(tmp_path / "out"))
    weights, config = (tmp_path / "out" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama saved by transformers."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=257,
        max_position_embeddings=128,
        eos_token_id=256,
    )
    folder = tmp_path_factory.mktemp("published") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["convert", "upcycle"])
def test_the_report_has_the_bytes_after_each_shard(dense, tmp_path, command):
    calls = []
    options = {"shard_bytes": 20_000, "report": lambda *sizes: calls.append(sizes)}
    target = tmp_path / "out"
    if command == "convert":
        to_hf(from_hf(dense), target, **options)
    else:
        upcycle(dense, target, Upcycling(4, 2), **options)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    totals = {total for _, total in calls}
    assert len(totals) == 1
    written = [done for done, _ in calls]
    assert written == sorted(written)
    assert (written[0], written[-1]) == (0, totals.pop())
    assert len(written) == len(shards) + 1
    model = from_hf(target)
    assert written[-1] == sum(p.numel() * torch.float32.itemsize for p in model.parameters())


def test_upcycle_says_what_it_writes(tokenyard, dense, tmp_path):
    shape = ("--num-experts", "4", "--top-k", "2")
    lines = tokenyard("upcycle", str(dense), str(tmp_path / "moe"), *shape)[1].splitlines()
    starts = ("reading ", "writing ", "wrote ", "load it: ", "it computes what ")
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_a_line_between_shards_says_what_is_written(tmp_path, capsys):
    report = writing_report(Console(width=40), tmp_path)
    for written in (0, 5 * 2**30, 10 * 2**30):
        report(written, 10 * 2**30)
    assert capsys.readouterr().out.splitlines() == [
        f"writing {tmp_path}: 10.0 GiB ...",
        f"writing {tmp_path}: 10.0 GiB, 5.00 GiB are written ...",
    ]
