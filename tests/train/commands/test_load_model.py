"""A loaded model computes in the precision of its training, or in the precision of the option."""

import re
from pathlib import Path

import pytest
import torch

from tokenyard import ConfigError, moe_layers
from tokenyard_models import to_hf
from tokenyard_train.commands import load_model
from tokenyard_train.commands.generate import generate
from tokenyard_train.commands.load_model import load_trained, load_weights_only
from tokenyard_train.commands.options import GenerateOptions
from tokenyard_train.data.stop_ids import stop_ids


def dtype_of_experts(loaded):
    """Return the dtype of the activations that the expert kernel receives."""
    seen = []
    experts = moe_layers(loaded.model)[0].experts
    kernel = experts.kernel
    experts.kernel = lambda x, *rest: seen.append(x.dtype) or kernel(x, *rest)
    with torch.no_grad(), loaded.autocast():
        assert loaded.model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
    return seen[0]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (None, torch.bfloat16),
        ("amp_bf16", torch.bfloat16),
        ("bf16_master", torch.bfloat16),
        ("fp32", torch.float32),
    ],
)
def test_a_run_computes_as_it_was_trained(trained, precision, dtype):
    assert dtype_of_experts(load_trained(trained, "cpu", precision)) == dtype


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, "amp_bf16", "fp32"])
def test_a_folder_computes_in_the_dtype_of_its_weights(trained, tmp_path, stored, precision):
    to_hf(load_weights_only(trained).model, tmp_path / "hf", dtype=stored)
    want = {None: stored, "amp_bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert dtype_of_experts(load_trained(tmp_path / "hf", "cpu", precision)) == want


def test_a_base_of_a_whole_model_is_refused(trained, tmp_path):
    to_hf(load_weights_only(trained).model, tmp_path / "hf")
    for path in (trained, next(trained.glob("ba*")), tmp_path / "hf"):
        for load in (lambda p: load_trained(p, "cpu", base=p), lambda p: load_weights_only(p, p)):
            with pytest.raises(ConfigError, match=r"--base .* has no effect, because .* holds a w"):
                load(path)


def test_amp_casts_the_weights_of_experts_once(trained, monkeypatch):
    """And computes the same bits as with a cast in each pass. Other weights stay in float32."""
    once = load_trained(trained, "cpu", "amp_bf16")
    monkeypatch.setattr(load_model, "narrow_experts", lambda model: None)
    each = load_trained(trained, "cpu", "amp_bf16")
    ids = torch.randint(0, 60, (2, 7))
    logits = []
    for loaded in (once, each):
        with torch.no_grad(), loaded.autocast():
            logits.append(loaded.model(ids).logits)
    assert torch.equal(*logits)
    dtypes = {name: p.dtype for name, p in once.model.named_parameters()}
    assert {dtypes.pop(name) for name in list(dtypes) if ".experts." in name} == {torch.bfloat16}
    assert set(dtypes.values()) == {torch.float32}


def test_an_unknown_precision_or_device_is_named(trained):
    with pytest.raises(
        ConfigError, match=r"--precision 'bf16' is unknown.*known are: fp32, amp_bf16"
    ):
        load_trained(trained, precision="bf16")
    with pytest.raises(ConfigError, match="--device is 'tpu'; give cpu, cuda, cuda:N or auto"):
        load_trained(trained, "tpu")


def test_the_options_reach_the_commands(tokenyard, trained, text, tmp_path):
    prompt = ("--prompt", "1 times", "--max-new-tokens", "3")
    generate = ("generate", str(trained), *prompt, "--precision")
    code, out, _ = tokenyard(*generate, "fp32")
    assert (code, out[:7]) == (0, "1 times")
    assert tokenyard(*generate, "fp64")[0] == 2
    folders = ("--data", str(text), "--out", str(tmp_path / "out"))
    routing = ("routing", str(trained), *folders, "--precision", "amp_bf16")
    assert tokenyard(*routing, "--device", "cpu")[0] == 0
    assert "--device is 'tpu'" in tokenyard(*routing, "--device", "tpu")[2]


@pytest.mark.parametrize(
    ("content", "ids", "said"),
    [
        ('{"eos_token_id": 3}', {3}, ""),
        ('{"eos_token_id": [3, 4]}', {3, 4}, ""),
        ('{"eos_token_id": null}', set(), ""),
        ("{}", set(), ""),
        (
            '{"eos_token_id": "3"}',
            set(),
            "has the eos_token_id '3'; values that are not integers are ignored",
        ),
        ('{"eos_token_id": [3, null]}', {3}, "has the eos_token_id"),
        ("{", set(), "generation_config.json is not JSON: .*; the tokenizer alone says how"),
        ("[]", set(), "is not a JSON object but list; the tokenizer alone says how"),
    ],
)
def test_ids_that_end_a_document(tmp_path, caplog, content, ids, said):
    assert stop_ids(tmp_path) == set()
    (tmp_path / "generation_config.json").write_text(content)
    assert stop_ids(tmp_path) == ids
    assert bool(caplog.records) == bool(said)
    assert re.search(said, caplog.text)


def test_a_full_model_says_so(trained, caplog):
    """The model has 24 positions, and the prompt takes 7."""
    generate(GenerateOptions(trained, ["1 times"], 200, 0.0, device="cpu"))
    assert re.search("after 17 new tokens instead of 200: .* max_seq_len is 24", caplog.text)
    caplog.clear()
    generate(GenerateOptions(trained, ["1 times"], 17, 0.0, device="cpu"))
    assert "instead of" not in caplog.text


def test_hf_before_a_folder_is_named():
    with pytest.raises(ConfigError, match="hf:/folder is the form of load_path; leave hf:// out"):
        load_trained(Path("hf://folder"), "cpu")
