"""`tokenyard eval`: the perplexity of files, and tasks of lm-eval made of local files."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from tokenyard import ConfigError
from tokenyard_models import to_hf
from tokenyard_train.commands.evaluate import evaluate
from tokenyard_train.commands.harness_model import HarnessModel
from tokenyard_train.commands.load_model import load_trained
from tokenyard_train.commands.options import EvalOptions
from tokenyard_train.commands.train import train
from tokenyard_train.config import read_config

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of random weights with a BPE tokenizer and ChatML's template."""
    pytest.importorskip("tokenizers")
    from tokenyard_models import Mixtral

    from ..chat_folder import write_tokenizer

    folder = tmp_path_factory.mktemp("model")
    model = Mixtral({"size": "tiny", "hidden_size": 32, "vocab_size": 400, "max_seq_len": 48})
    model.init_weights(3)
    texts = ["What is 2 + 3? It is 5."] * 9
    # lm-eval puts a text without a context after the token of its beginning; we, after that of an
    # end. They are one here.
    source = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts, eos="<|end|>")
    to_hf(model, folder / "hf", like=source)
    return folder / "hf"


def test_bits_per_byte_of_a_file_are_those_of_the_run(settings, text, tokenyard, tmp_path):
    run = train(read_config(settings | {"eval_subset_num_batches": -1}), QUIET)
    options = ("--data", str(text / "b.txt"), "--out", str(tmp_path / "out"))
    code, out, errors = tokenyard("eval", str(run.folder), *options, "--batch-size", "64")
    assert (code, errors) == (0, "")
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    (record,) = content["records"]
    assert record["bits_per_byte"] == pytest.approx(run.bits_per_byte, rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert f"{record['bits_per_byte']:.4f}" in out


def test_a_command_without_work_or_text_or_of_several_ranks_is_refused(
    tokenyard, trained, tmp_path, monkeypatch
):
    nothing = "error: there is nothing to evaluate; give --tasks, --data or both\n"
    assert tokenyard("eval", str(trained)) == (2, "", nothing)
    (tmp_path / "empty.txt").touch()
    code, _, error = tokenyard("eval", str(trained), "--data", str(tmp_path / "empty.txt"))
    assert code == 2
    assert "there is no text" in error
    code, _, error = tokenyard("eval", str(trained), "--data", "nowhere")
    assert code == 2
    assert error.startswith("error: --data 'nowhere' does not exist; give a file of text")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="eval runs on one rank, and 2 were started; start it"):
        evaluate(EvalOptions(trained, data=[tmp_path]), QUIET)


def test_tasks_need_the_harness(tokenyard, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, error = tokenyard("eval", str(trained), "--tasks", "arc_easy")
    assert code == 2
    assert error == (
        "error: --tasks needs lm_eval, which is not installed; pip install "
        '"tokenyard-train[eval]"\n'
    )


@pytest.fixture
def harness(folder):
    """Our model and transformers' own in lm-eval, of the same folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM

    from tokenyard_train.commands.harness_model import build_harness_model

    loaded = load_trained(folder, "cpu")
    ours = build_harness_model(loaded, loaded.build_tokenizer(), 3)
    return ours, HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32")


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


LONG = "What is 2 + 3? " * 30  # more than the model's window


def test_likelihoods_are_those_of_transformers(harness):
    ours, theirs = harness
    pairs = [("What is", " 2"), ("", "It is 5."), ("2 + ", "3"), (LONG, "It is 5."), ("Ü", " ?")]
    requests = instances("loglikelihood", pairs)
    for got, want in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert got == (pytest.approx(want[0], rel=1e-4), want[1])
    requests = instances("loglikelihood_rolling", [(LONG,), ("It",), ("",)])
    want = theirs.loglikelihood_rolling(requests)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(want, rel=1e-4)


def test_texts_are_those_of_transformers(harness):
    ours, theirs = harness
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    free = theirs.generate_until(instances("generate_until", [("What is", options)]))[0]
    stop = free[4:6]
    stopped = {"until": [stop], "max_gen_toks": 9}  # says nothing of sampling
    contexts = ("What is", "2 + 3? It is", LONG, "5")
    requests = instances("generate_until", [(c, o) for c in contexts for o in (options, stopped)])
    got = ours.generate_until(requests)
    assert got == theirs.generate_until(requests)
    assert got[0] == free
    assert got[1] == free.partition(stop)[0]


def test_batches_of_a_task_share_a_cache(folder, monkeypatch):
    """The longest contexts make it; the texts are those of each context alone."""
    utils = SimpleNamespace(normalize_gen_kwargs=lambda options, most: options)
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.utils"):
        monkeypatch.setitem(sys.modules, name, utils)
    loaded = load_trained(folder, "cpu")
    ours = HarnessModel(loaded, loaded.build_tokenizer(), 2)
    made = []
    new_cache = loaded.model.new_cache
    monkeypatch.setattr(
        loaded.model, "new_cache", lambda *sizes: made.append(sizes) or new_cache(*sizes)
    )
    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    contexts = ["5", "What is", "2 + 3? It", "2 + 3? It is"]
    requests = [SimpleNamespace(args=(context, options)) for context in contexts]
    together = ours.generate_until(requests)
    assert len(made) == 1
    assert together == [ours.generate_until([request])[0] for request in requests]


def write_task(folder, name, rows, **keys):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | keys))
    return str(folder / f"{name}.yaml")


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """A task of choices."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{n} + {n} =", "choices": [f"{n}", f"{2 * n}"]} for n in range(1, 9)]
    keys = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    }
    return write_task(tmp_path, "sums", rows, **keys)


def test_a_task_of_local_files(tokenyard, folder, sums, tmp_path, harness):
    out = ("--out", str(tmp_path / "out"))
    code, printed, _ = tokenyard("eval", str(folder), "--tasks", sums, "--limit", "6", *out)
    assert code == 0
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    (record,) = content["records"]
    _, theirs = harness
    pairs = [(f"{n} + {n} =", f" {m}") for n in range(1, 7) for m in (n, 2 * n)]
    nats = [each[0] for each in theirs.loglikelihood(instances("loglikelihood", pairs))]
    right = sum(second > first for first, second in zip(nats[::2], nats[1::2]))
    assert (record["task"], record["metric"], record["documents"]) == ("sums", "acc", 6)
    assert record["value"] == pytest.approx(right / 6)
    assert f"{record['value']:.4f}" in printed
    code, _, error = tokenyard("eval", str(folder), "--tasks", sums, "--num-fewshot", "99", *out)
    assert code == 2
    assert f"\nerror: lm-eval cannot run {sums}: Sample larger than population" in error
    assert "error: --tasks names no task; " in tokenyard("eval", str(folder), "--tasks", ",")[2]


def test_questions_of_a_chat_are_rendered_in_the_template(harness, folder, sums, monkeypatch):
    from tokenyard_train.commands.evaluate import evaluate
    from tokenyard_train.commands.harness_model import HarnessModel

    seen = []
    encode = HarnessModel.tok_encode
    monkeypatch.setattr(
        HarnessModel, "tok_encode", lambda self, text, **_: seen.append(text) or encode(self, text)
    )
    options = EvalOptions(folder, tasks=[sums], chat=True, num_fewshot=0, device="cpu", limit=1)
    monkeypatch.chdir(folder.parent)
    evaluate(options, QUIET)
    asked = "<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n"
    assert {f"{asked}1", f"{asked}2"} <= set(seen)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        pytest.param(
            "arc_esy",
            "is neither a task of lm-eval nor the path of a YAML file (did you mean 'arc_",
            marks=pytest.mark.full,  # reads the index of all tasks
        ),
        ("lost.yaml", "is neither a task of lm-eval nor the path of a YAML file"),
        ("no_data", "cannot be loaded by lm-eval: "),
    ],
)
def test_a_task_that_is_not_there_is_one_sentence(
    tokenyard, folder, sums, tmp_path, task, sentence
):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    if task == "no_data":
        task = sums
        (tmp_path / "sums.jsonl").unlink()
    code, _, error = tokenyard("eval", str(folder), "--tasks", task)
    assert code == 2
    assert error.startswith(f"error: --tasks {task!r} ")
    assert sentence in error
