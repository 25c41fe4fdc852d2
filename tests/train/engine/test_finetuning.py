"""Runs of `tokenyard train` on prompts and responses, packed into rows."""

import io
import json

import pytest
from rich.console import Console

from tokenyard import ConfigError
from tokenyard.model import Model
from tokenyard_models import Transformer
from tokenyard_train.checkpoint import CheckpointError
from tokenyard_train.commands.check import check
from tokenyard_train.commands.train import train

from ..conftest import MODEL

PACKED = "60 documents, 705 tokens, of which 185 supervised, in "


@pytest.fixture
def loud() -> Console:
    """A console that records what is printed."""
    return Console(record=True, width=200, file=io.StringIO())


@pytest.fixture
def finetuning(tmp_path) -> dict:
    """The loaders of a run on 60 sums of up to 20 tokens."""
    path = tmp_path / "sums.jsonl"
    rows = ({"prompt": f"{n} + {n} = ", "response": str(2 * n)} for n in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = {"name": "finetuning", "dataset": {"path": str(path)}}
    return {"train_loader": loader, "eval_loader": loader, "tokenizer": {"name": "bytes"}}


def test_a_run_learns_resumes_and_says_what_it_reads(finetuning, config, loud, console, tmp_path):
    whole = train(config(**finetuning, max_duration="20ba"), loud)
    said = " ".join(loud.export_text().split())
    assert PACKED in said
    records = [
        json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if record["kind"] == "train"]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert all(0 < step["supervised"] < 96 for step in steps)
    folder = str(tmp_path / "parts")
    parts = {"save_folder": folder, "scheduler": {"t_max": "20ba"}}
    train(config(**finetuning, **parts, max_duration="7ba"), console)
    rest = train(config(**finetuning, **parts, max_duration="20ba", autoresume=True), console)
    assert rest.train_loss == whole.train_loss
    assert rest.bits_per_byte == whole.bits_per_byte


def test_other_rows_are_refused_on_resume(finetuning, config, console, tmp_path):
    train(config(**finetuning, max_duration="2ba"), console)
    path = tmp_path / "sums.jsonl"
    path.write_text(path.read_text().replace('"118"', '"119"'))
    with pytest.raises(CheckpointError, match="dataset has other content than checkpoint"):
        train(config(**finetuning, max_duration="4ba", autoresume=True), console)


def test_check_says_documents_supervised_tokens_and_how_full_rows_are(finetuning, config, loud):
    check(config(**finetuning), loud)
    said = " ".join(loud.export_text().split())
    assert PACKED in said


def test_a_model_that_cannot_read_documents_is_refused(finetuning, config, console, monkeypatch):
    def forward(self, ids, cache=None, targets=None): ...

    monkeypatch.setattr(Transformer, "forward", forward)
    monkeypatch.setattr(Model, "forward", forward)
    with pytest.raises(ConfigError, match=r"_loader.name is 'finetuning', and .* does not read"):
        check(config(**finetuning, model=MODEL), console)


def test_ngram_baselines_are_refused(finetuning, config, console):
    from tokenyard_train.callbacks import build_callbacks

    settings = config(**finetuning, callbacks={"ngram_baselines": {}})
    with pytest.raises(ConfigError, match="counts one text, not conversations; leave it out"):
        train(settings, console, build_callbacks(settings.callbacks))
