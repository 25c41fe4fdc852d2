"""From a chat file and a folder of transformers to models and adapters that others load."""

import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers", minversion="5.14")
pytest.importorskip("peft", minversion="0.21")

import peft
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from tokenyard.tolerance import relative_error
from tokenyard_train.commands.load_model import load_trained

from ..chat_folder import write_tokenizer

QUESTIONS = {
    "What is 2 + 3?": "It is 5.",
    "And 7 + 1?": "8, of course.",
    "Who are you?": "A model.",
}
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": MixtralConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=2, num_local_experts=4
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=16, num_key_value_heads=2, head_dim=8, num_experts=4
    ),
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=16, num_key_value_heads=4, num_experts=4),
}
LORA = "lora={rank: 16, alpha: 16, targets: [attention.*, experts.*, head.weight]}"


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """A folder that transformers makes, with a BPE tokenizer and a chat template."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(tmp_path / "base")
    texts = [*QUESTIONS, *QUESTIONS.values()]
    return write_tokenizer(tmp_path / "base", texts)


@pytest.fixture
def tune(base, tmp_path, monkeypatch):
    """A config that fine-tunes `base` on conversations; return its name."""
    monkeypatch.chdir(tmp_path)
    with open("chats.jsonl", "w") as file:
        for question, answer in QUESTIONS.items():
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = {
        "load_path": "hf://base",
        "train_loader": {"name": "finetuning", "dataset": {"path": "chats.jsonl"}},
        "optimizer": {"name": "adamw", "lr": 0.02},
        "scheduler": {"name": "constant_with_warmup"},
        "max_seq_len": 64,
        "max_duration": "40ba",
        "global_train_batch_size": 2,
        "device": "cpu",
    }
    with open("tune.yaml", "w") as file:
        yaml.safe_dump(config, file)
    return "tune.yaml"


def run(tokenyard, *arguments):
    """Run a command, which must succeed; return what it printed."""
    code, out, errors = tokenyard(*arguments)
    assert code == 0, errors
    return out


def asked(tokenyard, model):
    """Return the answers of a model to all questions."""
    prompts = [part for question in QUESTIONS for part in ("--prompt", question)]
    return run(tokenyard, "generate", model, "--chat", "--temperature", "0", *prompts).splitlines()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(40).unsqueeze(0)).logits


def test_adapters_from_a_chat_file_to_peft(tokenyard, tune, monkeypatch):
    run(tokenyard, "train", tune, "run_name=tuned", "max_duration=150ba", "optimizer.lr=0.01", LORA)
    assert asked(tokenyard, "runs/tuned") == list(QUESTIONS.values())
    run(tokenyard, "convert", "runs/tuned", "adapters", "--to", "peft")
    run(tokenyard, "convert", "runs/tuned", "merged")
    assert asked(tokenyard, "adapters") == asked(tokenyard, "merged") == list(QUESTIONS.values())

    want = logits(load_trained(Path("runs/tuned"), "cpu").model)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained("adapters")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    base = AutoModelForCausalLM.from_pretrained("base")
    assert relative_error(logits(adapted), want) < 1e-5
    assert relative_error(logits(merged), want) < 1e-5
    assert relative_error(logits(base), want) > 0.1
    monkeypatch.chdir("adapters")  # the config of the run names the base by a relative path
    assert asked(tokenyard, "../runs/tuned") == list(QUESTIONS.values())


def test_a_whole_model_from_a_chat_file_to_transformers(tokenyard, tune):
    run(tokenyard, "train", tune, "run_name=full", "optimizer.lr=0.005")
    run(tokenyard, "convert", "runs/full", "full")
    assert asked(tokenyard, "runs/full") == asked(tokenyard, "full") == list(QUESTIONS.values())

    model = AutoModelForCausalLM.from_pretrained("full")
    want = logits(load_trained(Path("runs/full"), "cpu").model)
    assert relative_error(logits(model), want) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained("full")
    for question, answer in QUESTIONS.items():
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        out = model.generate(**ids, max_new_tokens=30, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == answer
