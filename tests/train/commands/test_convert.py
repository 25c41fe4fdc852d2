"""Fine-tuning from a Hugging Face folder to another one, which transformers loads."""

import os
import shutil

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5.14")

from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from tokenyard import ConfigError, LoraSettings, add_lora
from tokenyard.lora import adapters
from tokenyard.tolerance import relative_error
from tokenyard_models import WeightsError, from_hf, to_hf
from tokenyard_models.hf import to_peft
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.base import base_digest
from tokenyard_train.engine.sampling import Sampling, sample

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 257,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny Mixtral saved by transformers, for bytes."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("published") / "mixtral"
    config = MixtralConfig(
        **SIZES, max_position_embeddings=128, eos_token_id=256, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tuning(settings, published):
    """A config that fine-tunes `published`, without a model section."""
    changes = {
        "load_path": f"hf://{published}",
        "tokenizer": {"name": "bytes"},
        "max_duration": "12ba",
        "optimizer": {"name": "adamw", "lr": 0.003},
    }
    return {key: value for key, value in (settings | changes).items() if key != "model"}


def nats(folder, text):
    """Return transformers' loss on the training text."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list((text / "a.txt").read_bytes()[:960])]).view(-1, 96)
    with torch.no_grad():
        return F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_fine_tuning_from_folder_to_folder(tokenyard, tuning, published, text, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tuning))
    code, _, errors = tokenyard("train", str(tmp_path / "config.yaml"))
    assert (code, errors) == (0, "")
    code, _, errors = tokenyard("convert", str(tmp_path / "run"), str(tmp_path / "tuned"))
    assert (code, errors) == (0, "")
    assert nats(tmp_path / "tuned", text) < nats(published, text) - 0.5
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert tuned.config.max_position_embeddings == 128
    assert tuned.config.eos_token_id == 256


def test_an_exported_run_of_bytes_brings_its_tokenizer(tokenyard, config, text, tmp_path):
    """generate needs no --tokenizer, transformers reads the same ids, and a new run starts."""
    model = {"name": "mixtral", "size": "tiny", "hidden_size": 32, "intermediate_size": 24}
    train(config(max_duration="1ba", model=model), Console(quiet=True))
    exported = tmp_path / "exported"
    code, _, errors = tokenyard("convert", str(tmp_path / "run"), str(exported))
    assert (code, errors) == (0, "")
    options = {"prompt": ["3 times", "\u00e9"], "max_new_tokens": 9, "device": "cpu"}
    assert generate(GenerateOptions(exported, **options)) == generate(
        GenerateOptions(tmp_path / "run", **options)
    )
    tokenizer = AutoTokenizer.from_pretrained(exported)
    strange = "\u00e9 \u2581\u65e5\n\t 3  x"
    assert tokenizer(strange)["input_ids"] == list(strange.encode())
    assert tokenizer.decode(list(strange.encode())) == strange
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)
    for path in (str(exported), f"hf://{exported}"):
        again = read_config(
            {
                "load_path": path,
                "train_loader": {"name": "text", "dataset": {"path": str(text)}},
                "max_duration": "1ba",
                "global_train_batch_size": 1,
            }
        )
        assert again.tokenizer.name == str(exported)
        assert again.load_path == f"hf://{exported}"


def test_a_folder_without_a_tokenizer_is_not_trained_on_bytes(tuning):
    del tuning["tokenizer"]
    for section in ({}, {"tokenizer": {}}, {"tokenizer": None}):
        with pytest.raises(ConfigError, match=r"load_path .* has no tokenizer\.json.*or bytes"):
            read_config(tuning | section)


def test_convert_merges_adapters(tokenyard, tuning, published, text, tmp_path):
    lora = {"rank": 4, "train_also": ["*norm*"]}
    train(
        read_config(tuning | {"lora": lora, "optimizer": {"name": "adamw", "lr": 0.01}}),
        Console(quiet=True),
    )
    code, _, errors = tokenyard("convert", str(tmp_path / "run"), str(tmp_path / "tuned"))
    assert (code, errors) == (0, "")
    assert nats(tmp_path / "tuned", text) < nats(published, text) - 0.3
    ids = torch.randint(0, 257, (2, 20))
    want = load_trained(tmp_path / "run").model(ids).logits
    assert relative_error(from_hf(tmp_path / "tuned")(ids).logits, want) < 1e-5


def test_adapters_go_to_peft_and_back(tokenyard, tuning, published, tmp_path):
    """PEFT, `generate`, `convert` and a new run load what `convert --to peft` writes."""
    peft = pytest.importorskip("peft", minversion="0.21")
    lora = {"rank": 4, "targets": "*", "use_rslora": True}
    train(read_config(tuning | {"lora": lora, "optimizer": {"lr": 0.01}}), Console(quiet=True))
    run = tmp_path / "run"
    folder = tmp_path / "adapters"
    code, out, errors = tokenyard("convert", str(run), str(folder), "--to", "peft")
    assert (code, errors) == (0, "")
    assert f"adapters of {published}" in out
    ids = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        want = load_trained(run).model(ids).logits
        tuned = peft.AutoPeftModelForCausalLM.from_pretrained(
            folder, experts_implementation="eager"
        )
        assert relative_error(tuned(ids).logits, want) < 1e-5
        assert torch.equal(load_trained(folder).model(ids).logits, want)
    assert tokenyard("convert", str(folder), str(tmp_path / "merged"))[0] == 0
    assert relative_error(from_hf(tmp_path / "merged")(ids).logits, want) < 1e-5

    changes = {"load_path": str(folder), "save_folder": str(tmp_path / "b"), "max_duration": "1ba"}
    again = read_config(tuning | changes | {"optimizer": {"name": "adamw", "lr": 1e-30}})
    assert again.lora.settings() == LoraSettings(4, 16.0, rank_stabilized=True)
    assert again == read_config(again.model_dump() | {"load_path": f"hf://{folder}"})
    train(again, Console(quiet=True))
    assert torch.equal(load_trained(tmp_path / "b").model(ids).logits, want)
    with pytest.raises(ConfigError, match=r"lora differs from the adapters in load_path .*; drop"):
        read_config(tuning | changes | {"lora": {"rank": 8}})
    code, _, errors = tokenyard("convert", str(published), str(tmp_path / "no"), "--to", "peft")
    assert code == 2
    assert errors == "error: the model has no LoRA adapters; write it by --to hf\n"


def test_adapters_of_a_narrow_base_are_merged_and_written_wide(tokenyard, published, tmp_path):
    """The base has 16 bits, and the adapters have 32, as PEFT trains them."""
    base = tmp_path / "base"
    to_hf(from_hf(published), base, dtype=torch.bfloat16)
    model = from_hf(base, dtype=torch.float32)
    add_lora(model, LoraSettings(2, 2.0))
    for _, _, adapter in adapters(model):
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    to_peft(model, tmp_path / "adapters", base=str(base))
    again = ("convert", str(tmp_path / "adapters"), str(tmp_path / "again"), "--to", "peft")
    assert tokenyard(*again)[0] == 0
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapters", "again")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    merged = ("convert", str(tmp_path / "adapters"), str(tmp_path / "merged"), "--dtype", "float32")
    assert tokenyard(*merged)[0] == 0
    ids = torch.randint(0, 257, (2, 20))
    assert relative_error(from_hf(tmp_path / "merged")(ids).logits, model(ids).logits) < 1e-5


def test_adapters_of_another_base_are_an_error(tokenyard, published, tmp_path, caplog):
    """The folder has a digest of its base. PEFT saves none, and the command says so."""
    model = from_hf(published)
    add_lora(model, LoraSettings(2, 2.0))
    folder = tmp_path / "adapters"
    to_peft(model, folder, base=str(published), base_digest=base_digest(model))
    other = shutil.copytree(published, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})

    def outcome(base, *more):
        options = ("--tokenizer", "bytes", "--max-new-tokens", "1", *more)
        code, _, errors = tokenyard("generate", str(folder), "--base", str(base), *options)
        return code, errors

    moved = shutil.copytree(published, tmp_path / "moved")
    assert outcome(moved) == outcome(moved, "--precision", "amp_bf16") == (0, "")
    half = ("convert", str(folder), str(tmp_path / "half"), "--dtype", "float16")
    assert tokenyard(*half)[0] == 0
    code, errors = outcome(other)
    assert code == 2
    assert errors == (
        f"error: {folder} holds adapters of a base with other weights than {other} has; give the "
        "base that they were trained on\n"
    )
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    assert outcome(other)[0] == 0
    assert (
        f"{folder} does not record the weights of its base, so that --base {other}" in caplog.text
    )


def test_a_run_starts_from_the_exact_weights(tuning, published, tmp_path):
    still = {"max_duration": "1ba", "optimizer": {"name": "adamw", "lr": 1e-30}}
    train(read_config(tuning | still), Console(quiet=True))
    loaded = load_trained(tmp_path / "run").model
    want = from_hf(published)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters(), strict=True)
    )


def test_a_config_may_override_keys_but_not_the_model(tuning, published):
    config = read_config(tuning | {"model": {"moe_zloss_weight": 0.01}})
    assert [config.model[key] for key in ("name", "hidden_size", "moe_zloss_weight")] == [
        "mixtral",
        32,
        0.01,
    ]
    with pytest.raises(
        ConfigError, match=r"model\.name is 'dbrx' but load_path 'hf://.*' holds a mixtral; drop"
    ):
        read_config(tuning | {"model": {"name": "dbrx"}})
    with pytest.raises(WeightsError, match=r"is no folder; give one that holds config\.json"):
        read_config(tuning | {"load_path": f"hf://{published}x"})


def test_greedy_text_is_that_of_transformers(published):
    """64 tokens after prompts of different lengths, as a batch and one by one."""
    prompts = [list(text) for text in (b"3 times 7 is", b"x", b"and one more")]
    reference = AutoModelForCausalLM.from_pretrained(published)
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = [reference.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    model = from_hf(published)
    assert sample(model, prompts, Sampling(64, 0.0, 1)) == want
    assert [sample(model, [p], Sampling(64, 0.0, 1))[0] for p in prompts] == want


def test_text_ends_before_a_stop_id(published):
    model = from_hf(published)
    prompt = list(b"3 times")
    (whole,) = sample(model, [prompt], Sampling(20, 0.0, 1))
    stop = whole[7]
    assert sample(model, [prompt], Sampling(20, 0.0, 1, {stop, 300})) == [
        whole[: whole.index(stop)]
    ]


def test_generate_reads_folders_with_the_given_tokenizer(tokenyard, published):
    options = GenerateOptions(published, ["3 times", "x"], 9, 0.0, tokenizer="bytes")
    one, two = generate(options)
    arguments = [
        "--prompt",
        "3 times",
        "--prompt",
        "x",
        "--max-new-tokens",
        "9",
        "--temperature",
        "0",
    ]
    code, out, errors = tokenyard("generate", str(published), *arguments, "--tokenizer", "bytes")
    assert (code, out, errors) == (0, f"3 times{one}\nx{two}\n", "")


def test_convert_writes_a_run_at_step_zero(tokenyard, published, tmp_path, caplog):
    code, _, errors = tokenyard(
        "convert", str(published), str(tmp_path / "run"), "--to", "tokenyard"
    )
    assert code == 2
    assert "has no tokenizer.json; give --tokenizer" in errors
    code, _, errors = tokenyard(
        *("convert", str(published), str(tmp_path / "run"), "--to", "tokenyard"),
        *("--tokenizer", "bytes"),
    )
    assert code == 0
    assert "the run has the tokenizer 'bytes' and does not keep them" in errors + caplog.text
    run = GenerateOptions(tmp_path / "run", ["x"], 9, 0.0)
    folder = GenerateOptions(published, ["x"], 9, 0.0, tokenizer="bytes")
    assert generate(run) == generate(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--to", "hff"],
            "--to 'hff' is unknown (did you mean 'hf'?); known are: hf, tokenyard, megablocks, "
            "peft",
        ),
        (["--dtype", "float8"], "--dtype 'float8' is unknown"),
        (["--to", "tokenyard", "--dtype", "float32"], "--dtype has no effect with --to tokenyard"),
        (["--to", "tokenyard", "--fused"], "--fused has no effect with --to tokenyard"),
        (["--to", "megablocks", "--tokenizer", "bytes"], "--tokenizer has no effect with --to"),
        (["--to", "peft", "--tokenizer", "bytes"], "--tokenizer has no effect with --to peft"),
        (["--to", "peft", "--like", "."], "--like has no effect with --to peft"),
        (["--to", "peft", "--fused"], "--fused has no effect with --to peft"),
        (["--like", ".", "--tokenizer", "bytes"], "--like . and --tokenizer bytes both name"),
        (["--like", "."], "--like . holds no tokenizer; give a folder with one of tokenizer.json"),
    ],
)
def test_convert_refuses_unknown_choices(tokenyard, published, tmp_path, arguments, sentence):
    code, _, errors = tokenyard("convert", str(published), str(tmp_path / "new"), *arguments)
    assert code == 2
    assert errors.startswith(f"error: {sentence}")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_megablocks_is_not_read_back(tokenyard, trained, tmp_path):
    assert tokenyard("convert", str(trained), str(tmp_path / "mb"), "--to", "megablocks")[0] == 0
    for command in (("generate", "{}", "--prompt", "x"), ("convert", "{}", str(tmp_path / "hf"))):
        arguments = [part.format(tmp_path / "mb") for part in command]
        code, _, errors = tokenyard(*arguments)
        assert code == 2
        assert "is in MegaBlocks' format, which is written and not read; give the run" in errors
