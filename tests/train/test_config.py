"""The training config: what is read, filled in, warned of, and refused."""

import logging
import random
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenyard import ConfigError
from tokenyard_train.config import load_config, parse_span, read_config

ANNOUNCEMENT = """
model:
  name: mpt_causal_lm
  ffn_config:
    ffn_type: mb_dmoe
    moe_num_experts: 16
    moe_top_k: 4
    moe_world_size: 1
"""
REST = """
train_loader: {name: python_stdlib}
max_duration: 200ba
global_train_batch_size: 8
device: cpu
"""


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


def test_the_megablocks_announcement_s_snippet_with_the_keys_that_every_run_needs(load):
    config = load(ANNOUNCEMENT + REST)
    assert config.model["ffn_config"]["moe_num_experts"] == 16
    assert config.model["vocab_size"] == 257
    assert config.model["max_seq_len"] == config.max_seq_len == 1024
    assert config.eval_loader == config.train_loader
    assert config.save_folder == "runs/run"


def test_interpolation_and_overrides(load):
    text = ANNOUNCEMENT + REST + "variables: {peak: 1.0e-3}\noptimizer: {lr: '${variables.peak}'}\n"
    assert load(text).optimizer.lr == 1e-3
    config = load(text, "variables.peak=2e-3", "model.ffn_config.moe_top_k=2", "max_duration=1ep")
    assert (config.optimizer.lr, config.model["ffn_config"]["moe_top_k"], str(config.max_duration)) == (2e-3, 2, "1ep")


def test_keys_of_llm_foundry_that_mean_nothing_here_are_named_in_one_warning(load, caplog):
    extra = "fsdp_config: {sharding_strategy: FULL_SHARD}\ncallbacks: {speed_monitor: {window_size: 10}}\n"
    text = ANNOUNCEMENT + "    mlp_impl: grouped\n" + REST.replace("stdlib}", "stdlib, num_workers: 8}") + extra
    with caplog.at_level(logging.WARNING, "tokenyard"):
        load(text)
    (message,) = caplog.messages
    names = {"fsdp_config", "callbacks.speed_monitor", "train_loader.num_workers", "model.ffn_config.mlp_impl"}
    assert names == set(message.partition(": ")[2].split(", "))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("max_duraton: 3ba", r"max_duraton is not a known key \(did you mean 'max_duration'\?\)"),
        ("optimizer: {lrr: 1}", r"optimizer.lrr is not a known key \(did you mean 'lr'\?\); known are: betas, eps, lr"),
        ("optimizer: {lr: -1}", "optimizer.lr is -1; give a number above 0"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan; give a finite number"),
        ("max_duration: 200", "max_duration is 200: a duration is a number with ba"),
        ("max_duration: 0ba", "max_duration is 0ba; it must be above 0"),
        ("max_duration: 1dur", "max_duration is 1dur; it takes ba"),
        ("eval_interval: 0ep", "eval_interval is 0ep; it must be above 0"),
        ("save_num_checkpoints_to_keep: 0", r"save_num_checkpoints_to_keep is 0; it must be -1 \(all\) or at least 1"),
        (
            "train_loader: {name: pyhton_stdlib}",
            r"train_loader.name 'pyhton_stdlib' is unknown \(did you mean 'python_std",
        ),
        ("train_loader: {}", "train_loader.name is missing; it says which kind it is"),
        (
            "train_loader: {name: text, dataset: {pth: x}}",
            r"train_loader.dataset.pth is not .*\(did you mean 'path'\?\)",
        ),
        ("train_loader: {name: text}", "train_loader.dataset is missing; it has no default"),
        ("precision: fp8", "precision is 'fp8'; give 'fp32' or 'amp_bf16'"),
        ("backends: {expert: torch}", r"backends.expert is not a known key \(did you mean 'experts'\?\)"),
        ("loggers: {comet: {}}", "loggers.comet is not a known key"),
        ("global_train_batch_size: 0", "global_train_batch_size is 0; give a number above 0"),
        (
            "device_train_microbatch_size: 3",
            "is 3, which does not divide global_train_batch_size 8; these do: 1, 2, 4, 8",
        ),
        ("run_name: ../elsewhere", "run_name is '../elsewhere': string should match pattern"),
        ("device: tpu", "device is 'tpu'; give cpu, cuda or auto"),
        ("model: {name: dbrx, vocab_size: 99}", "model.vocab_size is 99 but the tokenizer has 257 ids"),
        ("model: {max_seq_len: 8}", "model.name is missing"),
        ("model: {name: dbrx, max_seq_len: 8}\nmax_seq_len: 16", "max_seq_len is 16 but model.max_seq_len only 8"),
        ("seed: [1]", r"seed is \[1\]; give a whole number"),
    ],
)
def test_wrong_keys_and_values(load, change, sentence):
    base = yaml.safe_load(ANNOUNCEMENT + REST)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(yaml.safe_dump(base | yaml.safe_load(change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a config is a mapping of keys to values"),
        ("- 1\n- 2", "a config is a mapping of keys to values"),
        ("a: [1", "not a usable YAML config: while parsing"),
        ("a: 1\na: 2", "found duplicate key a"),
        ("a: &x [1]\nb: *x", r"the YAML alias \*x is not supported; write \$\{key\} instead"),
        ("a: ${nowhere}", "Interpolation key 'nowhere' not found"),
        ("a: !!python/object/apply:os.system ['true']", "not a usable YAML config: could not determine a constructor"),
        ("a: " + "[" * 4000, "not a usable YAML config"),
        ("a: " + "x" * (1 << 20), "a config has at most 1048576"),
    ],
    ids=["empty", "list", "syntax", "duplicate", "alias", "interpolation", "python tag", "deep", "large"],
)
def test_files_that_are_no_config(load, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(text)


def test_files_that_cannot_be_read(tmp_path, load):
    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist; give the path of a YAML config"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml cannot be read as UTF-8 text"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="override 'max_duration' is not of the form key=value"):
        load(ANNOUNCEMENT + REST, "max_duration")


def test_model_max_seq_len_stands_for_both_when_it_alone_is_given(config):
    assert config(model={"name": "dbrx", "max_seq_len": 48}, max_seq_len=48).max_seq_len == 48
    data = yaml.safe_load(ANNOUNCEMENT + REST)
    data["model"]["max_seq_len"] = 77
    assert read_config(data).max_seq_len == 77


def test_auto_microbatch_is_the_largest_divisor_that_fits(config):
    assert config(global_train_batch_size=12, max_seq_len=8).device_train_microbatch_size == 12
    assert config(global_train_batch_size=12, max_seq_len=4096).device_train_microbatch_size == 4
    assert config(global_train_batch_size=5, max_seq_len=1 << 20).device_train_microbatch_size == 1


def test_a_resolved_config_survives_json(config):
    first = config(eval_interval="2ba", backends={"experts": {"name": "torch"}})
    assert read_config(first.model_dump(mode="json")) == first


@pytest.mark.parametrize(
    ("text", "batches"), [("200ba", 200), ("1.5ep", 150), ("1000tok", 32), ("0.25dur", 20), (" 3 ba ", 3)]
)
def test_spans(text, batches):
    assert parse_span(text).batches(batch_tokens=32, epoch_batches=100, run_batches=80) == batches


KEYS = [*yaml.safe_load(ANNOUNCEMENT + REST), "optimizer", "scheduler", "backends", "callbacks", "nonsense"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "name", "lr"]), below, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_whatever_a_config_says_it_is_read_or_refused_in_one_sentence(changes):
    data = yaml.safe_load(ANNOUNCEMENT + REST) | changes
    with suppress(ConfigError):  # anything else fails the test
        read_config(data)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_mutated_files_never_crash(tmp_path_factory, randomness: random.Random):
    text = list(ANNOUNCEMENT + REST)
    for _ in range(randomness.randint(1, 6)):
        text[randomness.randrange(len(text))] = randomness.choice("\n :{}[]&*!'\"%@$0aé\t-")
    path: Path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_text("".join(text), encoding="utf-8")
    with suppress(ConfigError):
        load_config(path)
