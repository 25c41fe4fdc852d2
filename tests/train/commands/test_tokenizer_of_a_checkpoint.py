"""The tokenizer and the stop ids of a checkpoint are those that it was trained with."""

import json
import shutil

import pytest
from rich.console import Console

pytest.importorskip("tokenizers")

import tokenizers

from tokenyard import ConfigError
from tokenyard_models import to_hf
from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.commands import load_model
from tokenyard_train.commands.check import check
from tokenyard_train.commands.convert import convert
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.load_model import load_weights_only
from tokenyard_train.commands.options import ConvertOptions, GenerateOptions, RoutingOptions
from tokenyard_train.commands.routing import measure
from tokenyard_train.commands.train import train

MIXTRAL = {"name": "mixtral", "size": "tiny", "hidden_size": 32, "intermediate_size": 24}


def write_tokenizer(folder, reverse=False):
    """Write a tokenizer.json of one id per byte character, in one order or the other."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocab = {token: i for i, token in enumerate([*alphabet, "</s>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def one_batch(config, tokenizer):
    """Train one batch with the tokenizer in a folder; return the run's folder."""
    settings = config(max_duration="1ba", model=MIXTRAL, tokenizer={"name": str(tokenizer)})
    return train(settings, Console(quiet=True)).folder


@pytest.fixture
def run(config, tmp_path):
    """A run of one batch with the tokenizer in `tmp_path / "tok"`."""
    return one_batch(config, write_tokenizer(tmp_path / "tok"))


def greedy(model, tokenizer=None):
    return GenerateOptions(model, ["3 times"], 9, 0.0, tokenizer=tokenizer, device="cpu")


def test_a_changed_tokenizer_is_refused(tokenyard, config, run, text, tmp_path):
    before = generate(greedy(run))
    kept = shutil.copytree(tmp_path / "tok", tmp_path / "kept")
    write_tokenizer(tmp_path / "tok", reverse=True)
    said = "/tok' has other content than checkpoint"
    with pytest.raises(CheckpointError, match=said):
        generate(greedy(run))
    assert generate(greedy(run, str(kept))) == before
    assert generate(greedy(run, str(tmp_path / "tok"))) != before  # named, so meant
    for command in (
        ("convert", str(run), str(tmp_path / "hf")),
        ("routing", str(run), "--data", str(text), "--out", str(tmp_path / "out")),
    ):
        code, _, errors = tokenyard(*command)
        assert (code, said in errors, errors.count("\n")) == (2, True, 1)
    assert not (tmp_path / "hf").exists()
    other = {"save_folder": str(tmp_path / "other"), "max_duration": "1ba", "model": MIXTRAL}
    tokenizer = {"name": str(tmp_path / "tok")}
    with pytest.raises(
        CheckpointError, match=r"tokenizer '.*tok' has other content than load_path"
    ):
        train(config(tokenizer=tokenizer, load_path=str(run), **other), Console(quiet=True))


def test_a_tokenizer_that_moved_is_named_with_the_path_that_was_tried(
    tokenyard, config, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    moved = {"tokenizer": {"name": "tok"}, "save_folder": "relative", "model": MIXTRAL}
    train(config(max_duration="1ba", **moved), Console(quiet=True))
    before = generate(greedy(tmp_path / "relative"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, errors = tokenyard("generate", str(tmp_path / "relative"), "--prompt", "3 times")
    assert (code, errors.count("\n")) == (2, 1)
    assert f"tokenizer.name is 'tok' (looked for {tmp_path / 'elsewhere' / 'tok'})" in errors
    assert generate(greedy(tmp_path / "relative", "../tok")) == before


def test_an_exported_folder_has_the_token_ids_of_its_tokenizer(tokenyard, run, tmp_path):
    """A folder with a config.json beside the tokenizer says what its ids mean."""
    ids = {"bos_token_id": 7, "eos_token_id": 256, "pad_token_id": 8}
    (tmp_path / "tok" / "config.json").write_text(json.dumps(ids))
    (tmp_path / "tok" / "generation_config.json").write_text('{"eos_token_id": [256, 9]}')
    code, _, errors = tokenyard("convert", str(run), str(tmp_path / "hf"))
    assert (code, errors) == (0, "")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: written[key] for key in ids} == ids
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [256, 9]}


def test_a_folder_comes_back_from_a_run_as_it_was(tokenyard, run, tmp_path):
    first, there, back = (tmp_path / name for name in ("first", "there", "back"))
    assert tokenyard("convert", str(run), str(first))[0] == 0
    changes = {"max_position_embeddings": 2048, "bos_token_id": 7, "pad_token_id": 8}
    said = json.loads((first / "config.json").read_text()) | changes
    (first / "config.json").write_text(json.dumps(said))
    (first / "generation_config.json").write_text('{"eos_token_id": [256, 9], "top_k": 3}')
    for arguments in ((str(first), str(there), "--to", "tokenyard"), (str(there), str(back))):
        code, _, errors = tokenyard("convert", *arguments)
        assert (code, errors) == (0, "")
    assert json.loads((back / "config.json").read_text()) == said
    for name in ("generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (back / name).read_bytes() == (first / name).read_bytes()


def test_stop_ids_belong_to_a_tokenizer(config, trained, tmp_path):
    """Those of the folder that a run starts from say nothing of the run's own tokenizer."""
    folder = tmp_path / "hf"
    start = {"max_duration": "1ba", "model": MIXTRAL, "save_folder": str(tmp_path / "first")}
    first = train(config(**start), Console(quiet=True)).folder
    to_hf(load_weights_only(first).model, folder)
    free = generate(greedy(folder, "bytes"))
    assert len(free[0]) > 0
    write_tokenizer(folder)
    every = json.dumps({"eos_token_id": list(range(256))})
    (folder / "generation_config.json").write_text(every)
    assert generate(greedy(folder)) == [""]
    assert generate(greedy(folder, "bytes")) == free
    settings = {"load_path": f"hf://{folder}", "tokenizer": {"name": "bytes"}, "model": {}}
    run = train(config(max_duration="1ba", **settings), Console(quiet=True)).folder
    with_folder = generate(greedy(run))
    shutil.rmtree(folder)
    assert generate(greedy(run)) == with_folder != [""]


def test_stop_ids_that_have_changed_since_the_training_are_named(config, tmp_path, caplog):
    folder = write_tokenizer(tmp_path / "tok")
    stops = folder / "generation_config.json"
    stops.write_text('{"eos_token_id": [256, 13]}')
    settings = {"max_duration": "1ba", "model": MIXTRAL, "tokenizer": {"name": str(folder)}}
    run = train(config(**settings), Console(quiet=True)).folder
    said = "'{}' has the end ids {}, and checkpoint {} was saved with [13, 256]; those of the file"

    def warnings_of(model, tokenizer=None):
        caplog.clear()
        generate(greedy(model, tokenizer))
        return [m for m in (r.getMessage() for r in caplog.records) if "end ids" in m]

    assert warnings_of(run) == []
    for content, ids in (('{"eos_token_id": 256}', [256]), (None, [])):
        stops.unlink()
        if content is not None:
            stops.write_text(content)
        (message,) = warnings_of(run)
        assert said.format(folder, ids, run / "ba1") in message
        assert warnings_of(run, str(folder)) == []  # named, so meant
    caplog.clear()
    convert(ConvertOptions(run, tmp_path / "hf"), Console(quiet=True))
    assert said.format(folder, [], run / "ba1") in caplog.text


def test_a_checkpoint_of_an_older_version_records_no_stop_ids(run, tmp_path, monkeypatch, caplog):
    def older(folder):
        meta = read_meta(folder)
        assert meta["stop_ids"] == []
        return meta | {"stop_ids": None}

    monkeypatch.setattr(load_model, "read_meta", older)
    (tmp_path / "tok" / "generation_config.json").write_text('{"eos_token_id": 13}')
    generate(greedy(run))
    assert "end ids" not in caplog.text


def write_small(folder, characters="0123456789 timesao,.\n"):
    """Write a tokenizer.json of a few characters, as it is without transformers' files."""
    folder.mkdir()
    vocab = {c: i for i, c in enumerate(dict.fromkeys(characters))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture
def small(config, tmp_path):
    """A run of one batch with a tokenizer of a few characters."""
    return one_batch(config, write_small(tmp_path / "few"))


def test_prompts_and_text_that_the_tokenizer_changes_are_named(
    config, small, tmp_path, caplog, tokenyard
):
    said = "{}: 1 {} contain characters that the tokenizer drops or changes (1 different ones, such"
    generate(GenerateOptions(small, ["3 times", "3 \u6771 times"], 2, 0.0, device="cpu"))
    assert said.format("--prompt", "prompts") in caplog.text
    caplog.clear()
    (tmp_path / "a.txt").write_text("3 times \u6771 is")
    measure(RoutingOptions(small, tmp_path / "a.txt", device="cpu"))
    assert said.format("--data", "documents") in caplog.text
    caplog.clear()
    callback = {"generate_callback": {"prompts": ["3 \u6771"]}}
    tokenizer = {"name": str(tmp_path / "few")}
    check(config(tokenizer=tokenizer, callbacks=callback, model=MIXTRAL), Console(quiet=True))
    assert said.format("callbacks.generate_callback.prompts", "prompts") in caplog.text


def test_a_tokenizer_with_more_ids_than_the_model_is_not_exported(small, tmp_path):
    other = write_tokenizer(tmp_path / "other")
    for options in ({"tokenizer": "bytes"}, {"tokenizer": str(other)}, {"like": other}):
        with pytest.raises(ConfigError, match=r"--(tokenizer|like) .* has 257 ids, and the model"):
            convert(ConvertOptions(small, tmp_path / "hf", **options), Console(quiet=True))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["qwen3", "dbrx", "olmoe"])
def test_transformers_reads_the_exported_tokenizer_as_it_was_trained_with(config, tmp_path, name):
    """Without a class, transformers takes that of the model, which splits text by its own rules."""
    transformers = pytest.importorskip("transformers", minversion="5.14")
    folder = write_small(tmp_path / "few")
    settings = {"model": {"name": name, "size": "tiny"}, "tokenizer": {"name": str(folder)}}
    run = train(config(max_duration="1ba", **settings), Console(quiet=True)).folder
    convert(ConvertOptions(run, tmp_path / "hf"), Console(quiet=True))
    want = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("3 times 10").ids
    got = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert got("3 times 10", add_special_tokens=False)["input_ids"] == want
