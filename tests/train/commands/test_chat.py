"""`tokenyard generate --chat` on a model that has learned one conversation by heart."""

import io
import json
import sys

import pytest
from rich.console import Console

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

import transformers

from tokenyard_train.commands.chat import Chat
from tokenyard_train.commands.convert import convert
from tokenyard_train.commands.options import ConvertOptions, GenerateOptions
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config
from tokenyard_train.engine.decoder import Decoder

from ..chat_folder import CHATML, write_tokenizer

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 7 + 1?"},
    {"role": "assistant", "content": "It is 8."},
]
SYSTEM = ("--system", "Be short.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Its end of a document is not the end of a turn."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_tokenizer(folder, [json.dumps(CHAT)], eos="<|end|>")


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run that has learned CHAT."""
    return trained(tmp_path_factory.mktemp("chat"), tokenizer, "40ba")


def trained(folder, tokenizer, duration, **dataset):
    (folder / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    settings = {
        "model": {"name": "mixtral", "size": "tiny", "hidden_size": 32, "vocab_size": 400},
        "tokenizer": {"name": str(tokenizer)},
        "train_loader": {
            "name": "finetuning",
            "dataset": {"path": str(folder / "chats.jsonl")} | dataset,
        },
        "optimizer": {"name": "adamw", "lr": 0.02},
        "scheduler": {"name": "constant_with_warmup"},
        "max_seq_len": 128,
        "max_duration": duration,
        "global_train_batch_size": 1,
        "save_folder": str(folder / "run"),
        "device": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_curve", "expert_heatmap"):
            patch.setattr(f"tokenyard_train.records.plots.{name}", lambda records, path: None)
        return train(read_config(settings), Console(quiet=True)).folder


@pytest.fixture
def chat(tokenyard, run):
    """Answer greedily; return (exit code, stdout, stderr)."""
    return lambda *options, model=run: tokenyard(
        "generate", str(model), "--chat", "--temperature", "0", *options
    )


class Terminal(io.StringIO):
    """Typed lines."""

    def isatty(self):
        return True


def test_each_prompt_is_a_conversation_of_one_turn(chat):
    prompt = ("--prompt", "What is 2 + 3?")
    assert chat(*SYSTEM, *prompt, *prompt) == (0, "5\n5\n", "")


def test_without_a_terminal_standard_input_is_the_message(chat, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2 + 3?\n"))
    assert chat(*SYSTEM) == (0, "5\n", "")


def test_on_a_terminal_each_line_is_answered_and_the_history_is_kept(chat, monkeypatch):
    """Tokens of earlier turns are in the cache, which has room for the second turn."""
    started = []
    start = Decoder.start
    monkeypatch.setattr(
        Decoder, "start", lambda *given: started.append(start(*given)) or started[-1]
    )
    monkeypatch.setattr(sys, "stdin", Terminal("What is 2 + 3?\n\nAnd 7 + 1?\n"))
    code, out, errors = chat(*SYSTEM)
    (first, nothing), (second, shared) = started
    assert nothing == 0 < shared
    assert first is second  # with its graph, if there is one
    assert (code, errors) == (0, "")
    assert out.replace("> ", "") == "5\nIt is 8.\n\n"


def test_the_ids_are_those_of_transformers(run, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    chat = Chat.load(GenerateOptions(run, device="cpu", chat=True))
    for messages in (CHAT[1:2], CHAT[:4]):
        want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat._encode(messages) == want


def test_an_exported_folder_answers_the_same(chat, run, tmp_path):
    convert(ConvertOptions(run, tmp_path / "hf"), Console(quiet=True))
    prompt = (*SYSTEM, "--prompt", "What is 2 + 3?")
    assert chat(*prompt, model=tmp_path / "hf") == (0, "5\n", "")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = theirs.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert theirs.decode(out[0, -1]) == "5"


def test_a_run_with_a_template_of_its_own_chats_and_is_exported_with_it(chat, tokenizer, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|end|>"))
    bare = other(tokenizer, tmp_path / "bare", lambda config: config.pop("chat_template"))
    run = trained(tmp_path, bare, "1ba", chat_template=str(template))
    assert chat("--prompt", "Hi", "--max-new-tokens", "1", model=run)[0] == 0
    convert(ConvertOptions(run, tmp_path / "hf"), Console(quiet=True))
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == template.read_text()


def other(source, folder, change):
    """Copy a tokenizer into a folder with a changed tokenizer_config.json."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    change(config)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_tokenizer_without_a_template_needs_a_file_of_one(chat, tokenizer, tmp_path):
    bare = other(tokenizer, tmp_path / "bare", lambda config: config.pop("chat_template"))
    prompt = (*SYSTEM, "--prompt", "What is 2 + 3?", "--tokenizer", bare)
    code, out, error = chat(*prompt)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: the tokenizer {bare!r} of ")
    assert error.endswith(
        "has no chat template; put one beside it as chat_template.jinja, give generate a file by "
        "--chat-template, or leave --chat out\n"
    )
    (tmp_path / "chatml.jinja").write_text(CHATML)
    template = ("--chat-template", str(tmp_path / "chatml.jinja"))
    assert chat(*prompt, *template) == (0, "5\n", "")


@pytest.mark.parametrize(
    ("template", "options", "sentence"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
            (*SYSTEM, "--prompt", "Hi"),
            "error: the conversation: the chat template refuses it: no system\n",
        ),
        (CHATML, ("--prompt", " "), "error: the message is empty; give text by --prompt or "),
        (
            CHATML,
            ("--prompt", "2 + " * 128),
            "tokens and the model's max_seq_len is 128; start a new one, or shorten the message\n",
        ),
    ],
    ids=["role", "empty", "full"],
)
def test_what_cannot_be_answered_is_one_sentence(chat, tmp_path, template, options, sentence):
    (tmp_path / "t.jinja").write_text(template)
    code, out, error = chat("--chat-template", str(tmp_path / "t.jinja"), *options)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert sentence in error


def test_a_template_without_an_end_of_turn_is_a_warning(chat, tmp_path, caplog):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    options = ("--prompt", "Hi", "--max-new-tokens", "2")
    assert chat("--chat-template", str(tmp_path / "t.jinja"), *options)[0] == 0
    assert "the chat template ends an answer with no special token, so that" in caplog.text


def test_options_of_a_chat_need_one(tokenyard, run):
    code, _, error = tokenyard("generate", str(run), *SYSTEM)
    assert (code, error) == (2, "error: --system has no effect without --chat; add --chat\n")
