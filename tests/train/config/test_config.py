"""Read a training config: defaults, warnings for ignored keys, and errors."""

import logging
import random
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenyard import ConfigError
from tokenyard_train.config import TrainConfig, load_config, parse_span, read_config

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
FOUNDRY = """
variables:
  global_seed: 17
  max_seq_len: 64
max_seq_len: ${variables.max_seq_len}
run_name:  # LLM Foundry reads it from the environment
model:
  name: mpt_causal_lm
  init_device: meta
  d_model: 64
  n_heads: 4
  n_layers: 2
  expansion_ratio: 4
  max_seq_len: ${variables.max_seq_len}
  vocab_size: 50368
  attn_config: {attn_impl: flash}
tokenizer:
  name: bytes
  kwargs: {model_max_length: '${variables.max_seq_len}'}
train_loader:
  name: python_stdlib
  dataset: {split: train, shuffle: true, max_seq_len: '${variables.max_seq_len}', shuffle_seed: 17}
  drop_last: true
  num_workers: 8
eval_loader:
  name: python_stdlib
  dataset: {split: val, shuffle: false, max_seq_len: '${variables.max_seq_len}', shuffle_seed: 17}
  drop_last: false
  num_workers: 8
scheduler: {name: cosine_with_warmup, t_warmup: 100ba, alpha_f: 0.1}
optimizer: {name: decoupled_adamw, lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-08, weight_decay: 0.0}
algorithms: {gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}
max_duration: 4800ba
eval_interval: 500ba
eval_first: false
eval_subset_num_batches: -1
global_train_batch_size: 256
seed: ${variables.global_seed}
device_eval_batch_size: 16
device_train_microbatch_size: 16
precision: amp_bf16
fsdp_config: {sharding_strategy: FULL_SHARD, mixed_precision: PURE}
progress_bar: false
log_to_console: true
console_log_interval: 1ba
callbacks:
  {speed_monitor: {window_size: 10}, lr_monitor: {}, memory_monitor: {}, runtime_estimator: {}}
loggers: {wandb: {}}
save_folder: ./{run_name}/checkpoints
save_interval: 500ba
save_num_checkpoints_to_keep: 1
"""


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


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
    assert (
        config.optimizer.lr,
        config.model["ffn_config"]["moe_top_k"],
        str(config.max_duration),
    ) == (2e-3, 2, "1ep")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("callbacks={}", []),
        ("callbacks={early_stopper: {}}", ["ngram_baselines", "early_stopper"]),
        ("callbacks={generate_callback: null}", ["ngram_baselines"]),
    ],
)
def test_an_empty_mapping_empties_a_section(load, caplog, override, names):
    """Any other one is merged with it."""
    text = ANNOUNCEMENT + REST + "callbacks: {ngram_baselines: {}}\n"
    given = dict(load(text, override).callbacks)
    assert [name for name in given if given[name] is not None] == names
    assert not caplog.messages


def test_keys_of_llm_foundry_that_mean_nothing_here_are_named_in_one_warning(load, caplog):
    extra = """
fsdp_config: {verbose: true}
callbacks: {env_logger: {}}
"""
    text = (
        ANNOUNCEMENT
        + "    mlp_impl: grouped\n"
        + REST.replace("stdlib}", "stdlib, num_workers: 8}")
        + extra
    )
    with caplog.at_level(logging.WARNING, "tokenyard"):
        load(text)
    (message,) = caplog.messages
    names = {
        "fsdp_config.verbose",
        "callbacks.env_logger",
        "train_loader.num_workers",
        "model.ffn_config.mlp_impl",
    }
    assert names == set(message.partition(": ")[2].split(", "))


@pytest.mark.parametrize(
    ("change", "instead"),
    [
        ("tokenizer_name=gpt2", "tokenizer_name is .*; say tokenizer: {name: bytes}"),
        (
            "global_seed=17",
            r"global_seed is .*; put it under variables, and write \$\{variables.global_seed\}",
        ),
        (
            "train_loader.dataset.remote=x",
            "train_loader.dataset.remote is .*; bring the shards here and name their",
        ),
        (
            "eval_loader.dataset.hf_kwargs={}",
            "eval_loader.dataset.hf_kwargs is .*; name a folder or a dataset by hf_name",
        ),
        (
            "callbacks.generate_callback.kwargs={}",
            "kwargs is .*; say max_new_tokens and temperature beside prompts",
        ),
    ],
)
def test_keys_of_llm_foundry_that_are_called_otherwise_here(load, change, instead):
    with pytest.raises(ConfigError, match=instead):
        load(ANNOUNCEMENT + REST, change)


def test_an_llm_foundry_file_loads_once_its_data_is_here(load, caplog):
    """FOUNDRY is a pretraining file of LLM Foundry. Only its tokenizer and dataset are replaced."""
    config = load(FOUNDRY)
    assert (config.run_name, config.save_folder, config.seed) == ("run", "./run/checkpoints", 17)
    assert (config.max_seq_len, config.eval_subset_num_batches, config.optimizer.betas) == (
        64,
        -1,
        (0.9, 0.95),
    )
    assert config.eval_loader is not None
    (message,) = caplog.messages
    assert "model.init_device" in message
    assert "callbacks" not in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("max_duraton: 3ba", r"max_duraton is not a known key \(did you mean 'max_duration'\?\)"),
        (
            "optimizer: {lrr: 1}",
            r"optimizer.lrr is not a known key \(did you mean 'lr'\?\); known are: betas, eps, lr",
        ),
        ("optimizer: {lr: -1}", "optimizer.lr is -1; give a number above 0"),
        ("optimizer: {lr: .nan}", "optimizer.lr is nan; give a finite number"),
        ("max_duration: '200'", "max_duration is '200': a duration is a number with ba"),
        ("max_duration: 0ba", "max_duration is 0ba; it must be above 0"),
        ("max_duration: 1dur", "max_duration is 1dur; it takes ba"),
        ("eval_interval: 0ep", "eval_interval is 0ep; it must be above 0"),
        (
            "save_num_checkpoints_to_keep: 0",
            r"save_num_checkpoints_to_keep is 0; it must be -1 \(all\) or at least 1",
        ),
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
        ("precision: fp8", "precision is 'fp8'; give 'fp32', 'amp_bf16' or 'bf16_master'"),
        (
            "backends: {expert: torch}",
            r"backends.expert is not a known key \(did you mean 'experts'\?\)",
        ),
        ("loggers: {comet: {}}", "loggers.comet is not a known key"),
        ("global_train_batch_size: 0", "global_train_batch_size is 0; give a number at least 1"),
        (
            "device_train_microbatch_size: 3",
            "is 3, which does not divide global_train_batch_size 8; these do: 1, 2, 4, 8",
        ),
        (
            "run_name: ../elsewhere",
            "run_name is '../elsewhere': it names a folder, so give letters, digits",
        ),
        ("device: tpu", "device is 'tpu'; give cpu, cuda, cuda:N or auto"),
        (
            "model: {name: dbrx, vocab_size: 99}",
            "model.vocab_size is 99 but the tokenizer has 257 ids",
        ),
        ("model: {max_seq_len: 8}", "model.name is missing"),
        (
            "model: {name: dbrx, max_seq_len: 8}\nmax_seq_len: 16",
            "max_seq_len is 16 but model.max_seq_len only 8",
        ),
        ("device: cuda:99", "device is 'cuda:99', but torch finds .* CUDA GPU"),
        (
            "seed: 9223372036854775808",
            "seed is 9223372036854775808; give a number below 9223372036854775808",
        ),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1 is 1; give a number below 1"),
        (
            "optimizer: {name: adam}",
            r"optimizer.name is 'adam' \(did you mean 'adamw'\?\); give 'decoupled_adamw', 'adamw'",
        ),
        (
            "device_train_microbatch_size: big",
            "device_train_microbatch_size is 'big'; give a whole number or 'auto'",
        ),
        (
            "backends: {experts: 5}",
            "backends.experts is 5; give text or a mapping of keys to values",
        ),
        ("max_seq_len: 1.5", "max_seq_len is 1.5; give a whole number"),
        ("callbacks: {kill_loss_spike: {}}", "callbacks.kill_loss_spike is not a known key"),
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
        (
            "a: [1",
            r"not a usable YAML config: expected ',' or '\]', but got '<stream end>' at line 1",
        ),
        ("a: 1\na: 2", "not a usable YAML config: found duplicate key a at line 2"),
        ("a: &x [*x]", "a YAML alias is inside of what it names"),
        (BOMB, "it has more than 1,048,576 characters with each YAML alias written out"),
        ("a: ${nowhere}", "not a usable YAML config: a: Interpolation key 'nowhere' not found$"),
        (
            "a: !!python/object/apply:os.system ['true']",
            "not a usable YAML config: could not determine a constructor",
        ),
        ("a:\n  " + "[" * 4000, "it is nested deeper than 40 levels"),
        ("a: " + "x" * (1 << 20), "has more than 1,048,576 bytes; at most 1,048,576 are read"),
    ],
    ids=[
        "empty",
        "list",
        "syntax",
        "duplicate",
        "endless alias",
        "nested aliases",
        "interpolation",
        "python tag",
        "deep",
        "large",
    ],
)
def test_files_that_are_no_config(load, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(text)


def test_files_that_cannot_be_read(tmp_path, load):
    with pytest.raises(
        ConfigError, match=r"nowhere.yaml does not exist; give the path of a YAML config"
    ):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        ConfigError, match=r"binary.yaml is not UTF-8 text; give the path of a YAML config"
    ):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(
        ConfigError, match="cannot be read: Is a directory; give the path of a YAML config"
    ):
        load_config(tmp_path)


def test_a_refused_override_is_named_beside_the_file(load):
    with pytest.raises(ConfigError, match=r"\.yaml with seed=1 optimizer.lrr=1: optimizer.lrr is "):
        load(ANNOUNCEMENT + REST, "seed=1", "optimizer.lrr=1")


RENAMED = """
model: {name: mixtral, size: tiny, num_local_experts: 8}
optimizer: {name: adamw, lr: 1.0e-4, betas: [0.9, 0.99]}
backends: {experts: {name: loop, speed: 3}}
"""


@pytest.mark.parametrize(
    ("override", "section", "dropped"),
    [
        ("model={name: dbrx, size: tiny}", "model", "num_local_experts"),
        ("optimizer={name: decoupled_adamw}", "optimizer", "betas, lr"),
        ("backends={experts: {name: sorted}}", "backends.experts", "speed"),
    ],
)
def test_an_override_with_another_name_replaces_the_section(
    load, caplog, override, section, dropped
):
    config = load(RENAMED + REST, override)
    said = [r.getMessage() for r in caplog.records if "override" in r.getMessage()]
    assert len(said) == 1
    assert f"the override of {section} by name" in said[0]
    assert f"its keys are dropped: {dropped};" in said[0]
    kept = yaml.safe_load(override.partition("=")[2])
    given = config.model_dump(exclude_unset=True)[override.partition("=")[0]]
    assert kept.items() <= given.items()
    assert not {"num_local_experts", "betas", "speed"} & given.keys()


@pytest.mark.parametrize(
    "override", ["model={name: mixtral, num_experts_per_tok: 1}", "model={num_experts_per_tok: 1}"]
)
def test_an_override_with_the_same_name_or_none_is_merged(load, caplog, override):
    model = load(RENAMED + REST, override).model
    assert (model["num_local_experts"], model["num_experts_per_tok"]) == (8, 1)
    assert "override" not in caplog.text


def test_a_name_alone_keeps_the_section_s_other_keys(load, caplog):
    assert load(RENAMED + REST, "optimizer.name=decoupled_adamw").optimizer.lr == 1e-4
    assert "override" not in caplog.text


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "max_duration",
            "override 'max_duration' is not of the form key=value, such as optimizer.lr=1e-3",
        ),
        ("=3", "override '=3' is not of the form key=value"),
        ("optimizer.betas[0]=0.8", r"of one item of a list; give .* optimizer.betas=\[1,2\]"),
        (
            "optimizer.betas=[0.9",
            r"override 'optimizer.betas=\[0.9' cannot be applied: expected .* at line 1",
        ),
        (
            "model=[1]",
            r"override 'model=\[1\]' cannot be applied: model: Cannot merge incompatible container",
        ),
        ("seed.below=1", "seed is {'below': 1}; give a whole number"),
        ("optimizer.lrr=1", r"optimizer.lrr is not a known key \(did you mean 'lr'\?\)"),
        (
            "seed=${variables.x}",
            "not a usable YAML config: seed: Interpolation key 'variables.x' not found",
        ),
    ],
)
def test_overrides_that_cannot_be_applied(load, override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(ANNOUNCEMENT + REST, override)


def test_model_max_seq_len_stands_for_both_when_it_alone_is_given(config):
    assert config(model={"name": "dbrx", "max_seq_len": 48}, max_seq_len=48).max_seq_len == 48
    data = yaml.safe_load(ANNOUNCEMENT + REST)
    data["model"]["max_seq_len"] = 77
    assert read_config(data).max_seq_len == 77


def test_held_out_text_is_scored_in_part_unless_asked_otherwise(config):
    assert config(eval_subset_num_batches=-1).eval_subset_num_batches == -1
    some = config(max_seq_len=64, global_train_batch_size=8)
    assert some.eval_subset_num_batches * some.device_eval_batch_size * 64 == 1 << 17


def test_auto_microbatch_is_the_largest_divisor_that_fits(config):
    assert config(global_train_batch_size=12, max_seq_len=8).device_train_microbatch_size == 12
    assert config(global_train_batch_size=12, max_seq_len=4096).device_train_microbatch_size == 4
    assert config(global_train_batch_size=5, max_seq_len=1 << 20).device_train_microbatch_size == 1


def test_a_resolved_config_survives_json(config):
    first = config(eval_interval="2ba", backends={"experts": {"name": "torch"}})
    assert read_config(first.model_dump(mode="json")) == first


README = Path(__file__).parents[3] / "packages" / "train" / "README.md"


def test_the_readme_s_config_loads_and_every_key_is_explained(load):
    text = README.read_text(encoding="utf-8")
    assert load(text.partition("```yaml\n")[2].partition("```")[0]).max_duration.value == 200
    assert [key for key in TrainConfig.model_fields if f"`{key}`" not in text] == []


@pytest.mark.parametrize(
    ("text", "batches"),
    [("200ba", 200), ("1.5ep", 150), ("1000tok", 32), ("0.25dur", 20), (" 3 ba ", 3)],
)
def test_spans(text, batches):
    assert parse_span(text).batches(batch_tokens=32, epoch_batches=100, run_batches=80) == batches


KEYS = [
    *yaml.safe_load(ANNOUNCEMENT + REST),
    "optimizer",
    "scheduler",
    "backends",
    "callbacks",
    "nonsense",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(KEYS),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "name", "lr"]), below, max_size=3)
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
