"""LLM Foundry's 26 training files: each passes `check`, or gets a sentence that says what to do."""

import json
import logging
import math
import re

import pytest
import torch
import yaml
from rich.console import Console

from tokenyard import TokenyardError
from tokenyard_models.hf import to_hf, to_megablocks
from tokenyard_train.commands.check import check
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.train import train
from tokenyard_train.config import load_config, read_config
from tokenyard_train.config.migrate import migrated
from tokenyard_train.engine.build_model import meta_model
from tokenyard_train.engine.resume import start_from
from tokenyard_train.engine.setup import build_setup

from ..data.test_mds import write as write_mds
from .foundry_files import FILES, LLAMA, LLAMA_1, build

UNKNOWN = "has model_type '{}'; give a model of one of these: mixtral, .*llama"
SCRATCH = UNKNOWN + ", .*or train one from random weights: model: {{name: mpt_causal_lm, d_model"
SENTENCES = {
    "pretrain/gpt-neo-125m": SCRATCH.format("gpt_neo"),
    "pretrain/gpt-neo-125m_eval": SCRATCH.format("gpt_neo"),
    "pretrain/gpt2-small": SCRATCH.format("gpt2"),
    "pretrain/opt-3b": UNKNOWN.format("opt"),
    "finetune/1b_local_data_sft": "preprocessing_fn .*no code of a config is run; write rows of",
    "finetune/t5-small_dolly_sft": "'hf_t5', .*encoder-decoder models are not here; say hf_causal",
    "finetune/mpt-7b_dolly_sft": UNKNOWN.format("mpt"),
    "finetune/mpt-30b-instruct": UNKNOWN.format("mpt"),
    "finetune/gpt2-arc-easy-cpu-streaming-dataset": "streams names MDS shards, .*give path",
}
"""The files that do not run, and what is said of them. All others pass."""

_KNOWN_MODEL = "model.pretrained_model_name_or_path=meta-llama/Meta-Llama-3-8B"
_PRETRAINED = [_KNOWN_MODEL, "model.config_overrides={}"]
_RANDOM = ["model={name: mpt_causal_lm, d_model: 16, n_heads: 2, n_layers: 2}"]
ADVICE = {
    "pretrain/gpt-neo-125m": _RANDOM,
    "pretrain/gpt-neo-125m_eval": _RANDOM,
    "pretrain/gpt2-small": _RANDOM,
    "pretrain/opt-3b": _PRETRAINED,
    "finetune/1b_local_data_sft": ["train_loader.dataset.preprocessing_fn=null"],
    "finetune/t5-small_dolly_sft": [
        *_PRETRAINED,
        *("model.name=hf_causal_lm", "train_loader.dataset.decoder_only_format=true"),
    ],
    "finetune/mpt-7b_dolly_sft": _PRETRAINED,
    "finetune/mpt-30b-instruct": [
        *_PRETRAINED,
        *("train_loader.dataset.packing_ratio=auto", "eval_loader.dataset.packing_ratio=auto"),
    ],
    "finetune/gpt2-arc-easy-cpu-streaming-dataset": [
        *_PRETRAINED,
        *("train_loader.dataset.streams=null", "train_loader.dataset.path={rows}"),
    ],
}
"""What the sentence says, as overrides."""

OVERRIDES = ["device=cpu"]
OTHER_MODELS = {
    "gpt2": "gpt2",
    "EleutherAI/gpt-neo-125M": "gpt_neo",
    "facebook/opt-2.7b": "opt",
    "t5-small": "t5",
    "mosaicml/mpt-7b": "mpt",
    "mosaicml/mpt-30b": "mpt",
}
TINY_LLAMA = {
    "name": "llama",
    "size": "tiny",
    "max_position_embeddings": 8192,
    "max_seq_len": 8192,
}
TINY_DBRX = {"name": "dbrx", "size": "tiny", "max_seq_len": 4096}


def write_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: i for i, character in enumerate([*sorted(alphabet), "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def write_model(folder, section):
    settings = {"model": section, "train_loader": {"name": "python_stdlib"}}
    config = read_config(settings | {"max_duration": "1ba", "global_train_batch_size": 1})
    model = meta_model(config).to_empty(device="cpu")
    model.init_weights(0)
    to_hf(model, folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face cache with the models and tokenizers that the files name, in small."""
    cache = tmp_path_factory.mktemp("hub")
    sections = {LLAMA: TINY_LLAMA, LLAMA_1: TINY_LLAMA, "databricks/dbrx-instruct": TINY_DBRX}
    commit = "0123456789" * 4
    for name in {file.tokenizer for file in FILES.values()} | sections.keys() | OTHER_MODELS.keys():
        repository = cache / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / commit
        (repository / "snapshots").mkdir(parents=True)
        if name in sections:
            write_model(folder, sections[name])
        else:
            folder.mkdir()
        if name in OTHER_MODELS:
            (folder / "config.json").write_text(json.dumps({"model_type": OTHER_MODELS[name]}))
        write_tokenizer(folder)
    return cache


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of MDS shards and one of prompts and responses."""
    folder = tmp_path_factory.mktemp("data")
    text = [[f"{i} and {i} are {2 * i}, as everyone knows. ".encode() * 20] for i in range(60)]
    for split in ("train", "val", "train_small", "val_small"):
        write_mds(folder / "text" / split, [text], ["text"], ["str"], [None])
    rows = [json.dumps({"prompt": f"{i} + {i} is ", "response": f"{2 * i}."}) for i in range(60)]
    (folder / "rows").mkdir()
    for split in ("train", "test", "validation"):
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def load(hub, data, tmp_path, monkeypatch):
    """Load a file of LLM Foundry, with its data on this machine."""
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def load(name, *overrides):
        config = build(name)
        config["variables"]["data_local"] = str(data / "text")
        for key in ("train_loader", "eval_loader"):
            dataset = (config[key] or {}).get("dataset", {})
            if "hf_name" in dataset and "hf_kwargs" not in dataset:
                dataset = {k: v for k, v in dataset.items() if k not in ("hf_name", "split")}
                path = data / "rows" / f"{config[key]['dataset']['split']}.jsonl"
                config[key] = config[key] | {"dataset": dataset | {"path": str(path)}}
            if "hf_kwargs" in dataset:
                files = {"hf_kwargs": {"data_dir": str(data / "rows")}}
                config[key] = config[key] | {"dataset": dataset | files}
        if config.get("load_path"):
            config["load_path"] = None
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump(config))
        run = f"save_folder={tmp_path / 'run'}"
        return load_config(path, [*OVERRIDES, run, *overrides])

    return load


@pytest.mark.parametrize("name", [name for name in FILES if name not in SENTENCES])
def test_the_migrated_file_means_the_same(load, name, tmp_path, caplog):
    """It is read without a warning. `parallel` is what fsdp_config asks for."""
    config = load(name)
    text = migrated(tmp_path / "file.yaml", OVERRIDES, processes=1)
    (tmp_path / "new.yaml").write_text(text)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tokenyard"):
        same = load_config(tmp_path / "new.yaml", [f"save_folder={tmp_path / 'run'}"])
    assert same == config
    assert_changes_have_comments(tmp_path / "file.yaml", text)
    assert not [m for m in caplog.messages if "ignored" in m or "LLM Foundry" in m]
    sharded = yaml.safe_load(migrated(tmp_path / "file.yaml", OVERRIDES, processes=8))
    assert sharded["parallel"] == {"strategy": "fsdp"}


def leaves(section, prefix=""):
    """The keys of a config, with the sections in which they are, and their values."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assert_changes_have_comments(path, text):
    """A comment names each key that is absent or has another value, or a section around it."""
    named = set(re.findall(r"^# (\S+): ", text, re.MULTILINE))
    after = dict(leaves(yaml.safe_load(text)))
    for key, value in leaves(yaml.safe_load(path.read_text())):
        parts = key.split(".")
        if after.get(key, ...) != value:
            assert named & {".".join(parts[:n]) for n in range(1, len(parts) + 1)}, key


def test_comments_of_a_migrated_file(load, tmp_path):
    load("finetune/7b_dolly_sft")
    lines = migrated(tmp_path / "file.yaml", OVERRIDES).splitlines()
    for line in (
        "# eval_interval: 1 -> 1ep; a number without a unit counts epochs",
        "# fsdp_config.sharding_strategy: FULL_SHARD -> parallel.strategy: fsdp",
        "# callbacks.lr_monitor: {} -> metrics.jsonl has the learning rate of each step, as lr",
        "# train_loader.num_workers: 8 -> left out; it has no meaning here",
        "  max_seq_len: ${variables.max_seq_len}",
        "activation_checkpointing: true",
        "  strategy: fsdp",
    ):
        assert line in lines


@pytest.mark.parametrize("name", FILES)
def test_each_file_passes_or_is_answered(load, name):
    """17 of 26 pass. Their YAML aliases, blank keys and ${variables} are as LLM Foundry's."""
    if name in SENTENCES:
        with pytest.raises(TokenyardError, match=SENTENCES[name]) as caught:
            check(load(name), Console(quiet=True))
        assert "\n" not in str(caught.value)
    else:
        check(load(name), Console(quiet=True))


@pytest.mark.parametrize("name", SENTENCES)
def test_what_the_sentence_says_passes(load, name, data):
    rows = str(data / "rows" / "train.jsonl")
    overrides = [override.replace("{rows}", rows) for override in ADVICE[name]]
    check(load(name, *overrides), Console(quiet=True))


def test_how_many_files_pass():
    assert len(FILES) == 26
    assert len(FILES.keys() - SENTENCES.keys()) == 17


SMALL = [
    *("variables.max_seq_len=48", "global_train_batch_size=4", "max_duration=3ba"),
    *("device_train_microbatch_size=2", "eval_subset_num_batches=1", "device_eval_batch_size=2"),
    *("precision=fp32", "scheduler.t_warmup=1ba"),
]
TINY_MPT = ["model.d_model=16", "model.n_heads=2", "model.n_layers=2", "model.vocab_size=300"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("pretrain/mpt-125m", TINY_MPT),
        ("pretrain/testing-moe", TINY_MPT),
        ("pretrain/testing-moe", [*TINY_MPT, "model.ffn_config.ffn_type=mb_moe"]),
        ("finetune/dbrx-full-ft", []),
        ("finetune/dbrx-lora-ft", []),
        ("finetune/llama-3-8b_domain_adapt", []),
    ],
)
def test_three_steps_in_small(load, name, overrides, tmp_path):
    config = load(name, *SMALL, *overrides)
    result = train(config, Console(quiet=True))
    assert result.batches == 3
    assert math.isfinite(result.train_loss)
    assert (tmp_path / "run" / "ba3").is_dir()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    rates = [record["lr"] for record in records if record["kind"] == "train"]
    assert rates[:2] == [0.0, config.optimizer.lr]
    assert records[-2]["remaining_s"] == 0  # runtime_estimator


def test_a_pretrained_model_starts_from_its_weights_and_another_does_not(load):
    assert load("finetune/llama-3-8b_domain_adapt").load_path.startswith("hf:///")
    config = load("pretrain/hf-llama-3.1-8B")
    assert config.load_path is None
    assert config.model["name"] == "llama"
    assert (config.max_seq_len, config.model["max_position_embeddings"]) == (2048, 8192)


def test_adapters_of_peft(load):
    lora = load("finetune/dbrx-lora-ft").lora
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 128, 0.05)
    assert lora.targets == ["blocks.*.attention.qkv.weight"]


def test_what_is_read_in_another_way_is_named_in_one_warning(load, caplog):
    with caplog.at_level(logging.WARNING, "tokenyard"):
        load("finetune/dbrx-full-ft")
    (message,) = [m for m in caplog.messages if m.startswith("read as LLM Foundry means it")]
    for part in (
        "tokenizer.name as /",
        "model.pretrained_model_name_or_path as load_path: hf:///",
        "train_loader.dataset.target_responses as last",
        "callbacks.hf_checkpointer as left out; run `tokenyard convert RUN OUT`",
    ):
        assert part in message


def test_a_run_starts_from_weights_with_the_names_of_llm_foundry(load, tmp_path):
    first = train(load("pretrain/testing-moe", *SMALL, *TINY_MPT), Console(quiet=True))
    weights = tmp_path / "weights"
    trained = load_trained(first.folder, "cpu").model
    to_megablocks(trained, weights)
    again = load(
        "pretrain/testing-moe", *SMALL, *TINY_MPT, f"load_path={weights}", "save_overwrite=true"
    )
    setup = build_setup(again, Console(quiet=True))
    start_from(setup.model, again.load_path)
    pairs = zip(trained.parameters(), setup.model.parameters())
    assert all(torch.equal(p, q) for p, q in pairs)
