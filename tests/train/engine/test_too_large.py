"""A model or a batch that no machine holds is one sentence and exit code 2, without a restart."""

import time

import pytest
import yaml

from tokenyard_train.engine import steps
from tokenyard_train.launch.supervisor import supervise


@pytest.fixture
def path(settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


NEVER = {
    "model.n_layers=1000000000": "layers is 1000000000; it must be at most 2000",
    "model.n_layers=9223372036854775808": "layers is .*; it must be at most",
    "model.d_model=1000000000000": "make a tensor of .* numbers",
    "model.ffn_config.moe_num_experts=1000000000000000000": "make a tensor of .* numbers",
    "model.ffn_config.ffn_hidden_size=100000000000000000": "make a tensor of .* numbers",
    "model.vocab_size=9223372036854775808": "make a tensor of .* numbers",
    "global_train_batch_size=1000000000": "token ids take .*GiB of a rank, and this machine",
}

HERE = {
    "model.vocab_size=99999999999": r"tensors take .* TiB and cpu has .* GiB in all; make the",
    "model.ffn_config.ffn_hidden_size=10000000000": "tensors take .*TiB and cpu has",
    "lora.rank=1000000000": "tensors take .*iB and cpu has",
    "max_seq_len=1000000000": "",
}


@pytest.mark.parametrize("override", NEVER)
@pytest.mark.parametrize("command", ["train", "check"])
def test_what_no_machine_holds_is_refused_at_once(command, override, tokenyard, path):
    start = time.monotonic()
    code, _, error = tokenyard(command, path, override, "device_train_microbatch_size=1")
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert_matches(NEVER[override], error)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("override", HERE)
def test_what_this_machine_does_not_hold_is_refused(override, tokenyard, path):
    code, _, error = tokenyard("train", path, override)
    assert code == 2
    assert error.count("\n") == 1
    assert_matches(HERE[override], error)


def test_check_warns_of_a_model_that_does_not_fit(tokenyard, path, caplog):
    code, _, _ = tokenyard("check", path, "model.ffn_config.ffn_hidden_size=1000000000")
    assert code == 0
    assert "a rank needs about" in caplog.text


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_in_a_step_is_a_mistake(error, tokenyard, path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(steps, "begin_step", fail)
    code, _, sentence = tokenyard("train", path)
    assert code == 2
    assert_matches("cpu is out of memory with device_train_microbatch_size 4", sentence)


def test_a_mistake_is_not_restarted(capfd):
    assert supervise(lambda started: ["sh", "-c", "echo once; exit 2"], 1, 3) == 2
    assert capfd.readouterr().out == "once\n"


def assert_matches(pattern, text):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)
