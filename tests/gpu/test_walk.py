"""Run every command as a user does, in the order of the docs: from ``backends`` to ``upcycle``.

Each command runs in its own process, on a GPU under every name of the device. The long suite also
runs them on a CPU, to test this module without a GPU. The tests of a class share one folder and
build upon each other.
"""

import json
import re
import signal

import pytest
import yaml
from walk import KILL, QUICKSTART, SHORT, Walk, differing, tensors

import tokenyard_train.checkpoint

CPU = pytest.param("cpu", marks=pytest.mark.full)
GPU, ALSO = (pytest.param(name, marks=pytest.mark.gpu) for name in ("auto", "cuda"))
WITH_INDEX = pytest.param("cuda:0", marks=pytest.mark.gpu)
AMP = "precision=amp_bf16"


@pytest.fixture(scope="class")
def walk(request, tmp_path_factory):
    """The folder and the device of all tests of a class."""
    return Walk(tmp_path_factory.mktemp("walk"), request.param)


@pytest.fixture(scope="class")
def text(walk):
    """A text file that is not in the training data."""
    path = walk.folder / "text.txt"
    path.write_text("".join(f"def square_{i}(x):\n    return x * x + {i}\n\n" for i in range(400)))
    return path


@pytest.fixture(scope="class")
def trained(walk):
    """A run in mixed precision, the input of most commands."""
    return walk.train("trained", AMP)


@pytest.fixture(scope="class")
def exported(walk, trained):
    """The model of `trained` as a Hugging Face folder."""
    walk("convert", trained, "exported", "--dtype", "bfloat16")
    return walk.folder / "exported"


@pytest.mark.parametrize("walk", [CPU, GPU], indirect=True, scope="class")
class TestWalk:
    """All commands, on the device that ``auto`` selects."""

    def test_backends_and_check(self, walk):
        assert re.search(r"^experts .* usable$", walk("backends"), re.MULTILINE)
        output = walk("check", QUICKSTART, f"device={walk.device}", "deterministic=true")
        assert "equal runs end bit-identical" in output
        assert "sum" in output

    @pytest.mark.parametrize("asynchronous", ["false", "true"])
    @pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
    def test_train_saves(self, walk, precision, asynchronous):
        name = f"{precision}-{asynchronous}"
        run = walk.train(name, f"precision={precision}", f"save_async={asynchronous}")
        for step in ("ba8", "ba12"):  # the quickstart keeps two checkpoints
            tokenyard_train.checkpoint.verify(run / step)

    def test_equal_runs_end_bit_identical(self, walk):
        first = walk.train("first", AMP, "deterministic=true")
        second = walk.train("second", AMP, "deterministic=true")
        assert differing(first / "ba12", second / "ba12") == []

    def test_a_killed_run_resumes_to_the_same_end(self, walk):
        longer = ("max_duration=120ba", "save_interval=40ba", "eval_interval=120ba", "callbacks={}")
        walk.train("whole", AMP, "deterministic=true", *longer)
        overrides = (*SHORT, *walk.settings("killed"), AMP, "deterministic=true", *longer)
        command = ("train", QUICKSTART, *overrides)
        code, _ = walk.interrupted(*command, "killed", after=50, number=KILL)
        assert code == -KILL
        assert "resumed after batch 40" in walk(*command, "autoresume=true")
        assert differing(walk.folder / "whole" / "ba120", walk.folder / "killed" / "ba120") == []

    @pytest.mark.parametrize(
        "precision", [(), ("--precision", "fp32"), ("--precision", "amp_bf16")]
    )
    def test_generate(self, walk, trained, precision):
        arguments = ("--prompt", "def ", "--max-new-tokens", 20, "--device", walk.device)
        assert walk("generate", trained, *arguments, *precision).startswith("def ")

    def test_routing(self, walk, trained, text):
        output = walk("routing", trained, "--data", text, "--device", walk.device)
        assert "entropy" in output
        assert json.loads((walk.folder / "routing" / "routing.json").read_text())["records"]

    @pytest.mark.parametrize(
        "precision", [(), ("--precision", "fp32"), ("--precision", "amp_bf16")]
    )
    def test_generate_from_a_folder(self, walk, exported, precision):
        options = ("--max-new-tokens", 20, "--device", walk.device, *precision)
        output = walk("generate", exported, "--tokenizer", "bytes", "--prompt", "def ", *options)
        assert output.startswith("def ")

    def test_convert_both_ways(self, walk, exported):
        walk("convert", exported, "back", "--to", "tokenyard")
        walk("convert", "back", "again", "--dtype", "bfloat16")
        assert differing(exported, walk.folder / "again") == []
        walk("convert", "back", "megablocks", "--to", "megablocks")
        assert tensors(walk.folder / "megablocks")

    def test_fine_tune(self, walk, exported):
        run = walk.train("tuned", AMP, f"load_path=hf://{exported}")
        assert walk("generate", run, "--prompt", "def ", "--max-new-tokens", 9).startswith("def ")

    def test_lora(self, walk, exported):
        run = walk.train("lora", AMP, f"load_path=hf://{exported}", "lora={rank: 4}")
        assert walk("generate", run, "--prompt", "def ", "--max-new-tokens", 9).startswith("def ")
        walk("convert", run, "merged")
        assert tensors(walk.folder / "merged").keys() == tensors(exported).keys()

    def test_upcycle(self, walk):
        dense = yaml.safe_load(QUICKSTART.read_text())
        dense["model"] = {"name": "llama", "hidden_size": 64, "intermediate_size": 128}
        dense["model"] |= {"num_hidden_layers": 2, "num_attention_heads": 4}
        path = walk.folder / "dense.yaml"
        path.write_text(yaml.safe_dump(dense))
        walk("convert", walk.train("dense", AMP, config=path), "dense-hf")
        walk("upcycle", "dense-hf", "sparse-hf", "--num-experts", 4, "--top-k", 2)
        options = ("--max-new-tokens", 9, "--device", walk.device)
        output = walk("generate", "sparse-hf", "--tokenizer", "bytes", "--prompt", "def ", *options)
        assert output.startswith("def ")

    def test_packed_data(self, walk, text):
        walk("data", "pack", "packed", text, "--tokenizer", "bytes")
        loader = "train_loader={name: text, dataset: {packed: packed}}"
        walk.train("on-packed", AMP, loader, "eval_loader=null", "global_train_batch_size=2")

    def test_launch(self, walk):
        walk("launch", QUICKSTART, *SHORT, *walk.settings("launched"), AMP, "--nproc", 1)
        tokenyard_train.checkpoint.verify(walk.folder / "launched" / "ba12")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    @pytest.mark.parametrize("command", ["train", "launch"])
    def test_a_signal_saves_and_stops(self, walk, command, number):
        name = f"{command}-{number.name}"
        settings = ("max_duration=100000ba", *walk.settings(name), AMP, "callbacks={}")
        code, output = walk.interrupted(
            command, QUICKSTART, *settings, name, after=3, number=number
        )
        assert (code, "Traceback" in output) == (75, False), output
        (checkpoint,) = (walk.folder / name).glob("ba*")
        tokenyard_train.checkpoint.verify(checkpoint)

    def test_bench(self, walk):
        common = ("--peers", "none", "--out", "bench")
        device = () if walk.device == "auto" else ("--device", walk.device)
        shape = ("--shape", "1024,256,128,8,2", "--repetitions", 3)
        walk("bench", "layer", *shape, *common, *device)
        assert json.loads((walk.folder / "bench" / "layer.json").read_text())["records"]
        walk("bench", "train", QUICKSTART, "--steps", 3, f"device={walk.device}", *common)


@pytest.mark.parametrize("walk", [ALSO, WITH_INDEX], indirect=True, scope="class")
class TestOtherNames:
    """Train, save and load on a device under its other names."""

    @pytest.mark.parametrize("asynchronous", ["false", "true"])
    def test_train_save_and_generate(self, walk, asynchronous):
        run = walk.train(f"run-{asynchronous}", AMP, f"save_async={asynchronous}")
        tokenyard_train.checkpoint.verify(run / "ba12")
        options = ("--prompt", "def ", "--max-new-tokens", 9, "--device", walk.device)
        assert walk("generate", run, *options).startswith("def ")
