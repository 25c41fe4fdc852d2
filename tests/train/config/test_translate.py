"""Sections of LLM Foundry in the keys of this package."""

import pytest
import yaml

from tokenyard import ConfigError
from tokenyard_train.config import load_config, read_config
from tokenyard_train.config.translate import Change, translate

from .test_config import ANNOUNCEMENT, REST

BASE = yaml.safe_load(ANNOUNCEMENT + REST)


def translated(config, processes=1):
    """The translated config, the changes by key, and the ignored keys."""
    changes: list[Change] = []
    ignored: list[str] = []
    read = translate(config, changes, ignored, processes)
    return read, {change.key: change.note for change in changes}, ignored


@pytest.mark.parametrize(
    ("fsdp", "strategy"),
    [
        ({}, "fsdp"),
        ({"sharding_strategy": "FULL_SHARD"}, "fsdp"),
        ({"sharding_strategy": "full_shard"}, "fsdp"),
        ({"sharding_strategy": "NO_SHARD"}, "ddp"),
        (
            {"sharding_strategy": "SHARD_GRAD_OP"},
            {"name": "fsdp", "reshard_after_forward": False},
        ),
        ({"sharding_strategy": "HYBRID_SHARD"}, {"name": "fsdp", "replicate": 4}),
        ({"data_parallel_shard_degree": 8}, {"name": "fsdp", "replicate": 2}),
        ({"data_parallel_replicate_degree": 8}, {"name": "fsdp", "replicate": 8}),
    ],
)
def test_sharding(fsdp, strategy, monkeypatch):
    """HYBRID_SHARD keeps a replica on each machine: here, 4 machines with 4 processes."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    read, changes, _ = translated({"fsdp_config": fsdp, "parallel": {"expert_parallel": 2}}, 16)
    assert read == {"parallel": {"expert_parallel": 2, "strategy": strategy}}
    assert changes == {"fsdp_config.sharding_strategy": f"parallel.strategy: {strategy}"}
    assert translated({"fsdp_config": fsdp})[0] == {}  # one process
    own = {"parallel": {"strategy": "single"}}
    assert translated({"fsdp_config": fsdp} | own, 16)[0] == own


def test_recompute_and_keys_that_choose_how_fsdp_communicates():
    fsdp = {"activation_checkpointing": True, "activation_cpu_offload": True, "verbose": True}
    read, _, ignored = translated({"fsdp_config": fsdp})
    assert read == {"activation_checkpointing": True, "activation_cpu_offload": True}
    assert ignored == ["fsdp_config.verbose"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fsdp_config": {"cpu_offload": True}}, "fsdp_config.cpu_offload is True: keeping param"),
        ({"fsdp_config": {"sharding_stratgy": 1}}, "did you mean 'sharding_strategy'"),
        (
            {
                "fsdp_config": {"activation_checkpointing": True},
                "activation_checkpointing": "selective",
            },
            "they mean the same, set one",
        ),
        ({"model": {"name": "hf_causal_lm"}}, "pretrained_model_name_or_path is missing"),
        (
            {"model": {"name": "hf_causal_lm", "pretrained_model_name_or_path": "no/model"}},
            r"'no/model', which is no folder here and not in .*\(hf download no/model\)",
        ),
        ({"eval_loader": [{"name": "python_stdlib"}]}, "eval_loader.0.label is None; give each"),
        ({"code_paths": ["x.py"]}, "code_paths is a key .*no code of a config is run"),
        ({"tp_config": {"degree": 2}}, "tp_config is a key of LLM Foundry"),
        (
            {"model": {"name": "hf_causal_lm", "pretrained_model_name_or_path": "../x"}},
            r"not in the local Hugging Face cache; give the path of its folder$",
        ),
        (
            {"eval_loader": [{"name": "python_stdlib", "label": "a"}], "eval_loaders": {"b": {}}},
            "eval_loader is a list and eval_loaders is set, too",
        ),
        ({"load_path": "x/ep0-ba9-rank0.pt"}, "is a pickle, .*convert it where it was made"),
        ({"load_path": "x/latest-rank0.pt.gz"}, "is a pickle"),
        ({"callbacks": {"layer_freezing": {"layer_names": ["a"]}}}, r"say frozen: \[patterns\]"),
        (
            {"model": BASE["model"] | {"peft_config": {"r": 2, "target_modules": ["Wqkv"]}}},
            "model.peft_config is a key .*say lora: {rank: 8, alpha: 16}",
        ),
        (
            {
                "train_loader": {
                    "name": "text",
                    "dataset": {"streams": {"a": {"local": "x", "repeat": 2}}},
                }
            },
            "streams.a.repeat is a key .*give proportion",
        ),
        ({"optimizer": {"name": "adamw", "disable_grad": ["a"]}}, r"say frozen: \[patterns\]"),
        ({"load_path": "x", "load_weights_only": False}, "say true, or resume a run by autoresume"),
    ],
)
def test_what_cannot_be_translated_is_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_config(BASE | change)


def test_a_sharded_checkpoint_of_composer_is_refused(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a pickle"):
        read_config(BASE | {"load_path": str(tmp_path)})


def test_a_file_with_two_documents_is_refused(tmp_path):
    (tmp_path / "two.yaml").write_text(ANNOUNCEMENT + REST + "---\nseed: 2\n")
    with pytest.raises(ConfigError, match="a file has one document, and another begins at line"):
        load_config(tmp_path / "two.yaml")


def test_sections_of_a_model_without_a_value_are_absent():
    blank = dict.fromkeys(("ffn_config", "attn_config", "init_config", "peft_config"))
    plain = {"name": "mpt_causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 2}
    assert read_config(BASE | {"model": plain | blank}) == read_config(BASE | {"model": plain})


def test_the_name_of_the_run_in_paths():
    paths = {"save_folder": "out/{run_name}", "load_path": "in/{run_name}/ba5"}
    config = read_config(BASE | paths | {"run_name": "moe"})
    assert (config.save_folder, config.load_path) == ("out/moe", "in/moe/ba5")


def test_intervals_without_a_unit_are_epochs():
    config = read_config(BASE | {"max_duration": 3, "eval_interval": 1, "save_interval": 2})
    spans = (config.max_duration, config.eval_interval, config.save_interval)
    assert [str(span) for span in spans] == ["3ep", "1ep", "2ep"]


def test_eval_loaders_with_labels():
    loaders = [{"name": "python_stdlib", "label": label} for label in ("code", "a/b")]
    config = read_config(BASE | {"eval_loader": loaders})
    assert config.eval_loader is None
    assert list(config.eval_loaders) == ["code", "a/b"]
    assert read_config(config.model_dump(mode="json")) == config


def test_files_of_a_finetuning_dataset():
    def loader(**dataset):
        return {"train_loader": {"name": "finetuning", "dataset": dataset}}

    files = {"hf_name": "json", "hf_kwargs": {"data_files": ["a.jsonl"]}, "split": "train"}
    assert translated(loader(**files))[0] == loader(path=["a.jsonl"])
    folder = {"hf_name": "json", "hf_kwargs": {"data_dir": "rows"}, "split": "validation"}
    assert translated(loader(**folder))[0] == loader(hf_name="rows", split="validation")
    by_split = {"hf_name": "json", "hf_kwargs": {"data_files": {"train": "a.jsonl"}}}
    assert translated(loader(**by_split))[0] == loader(path="a.jsonl")
    with pytest.raises(ConfigError, match="give a path or a list of paths, or one for the split"):
        translated(loader(**by_split, split="test"))
    with pytest.raises(ConfigError, match=r"local names MDS shards, .*give path"):
        translated(loader(local="shards"))
    with pytest.raises(ConfigError, match="hf_kwargs has revision"):
        translated(loader(hf_name="json", hf_kwargs={"revision": "x"}))
    read, _, _ = translated(loader(path="a", decoder_only_format=True))
    assert read["train_loader"]["dataset"]["packing_ratio"] == 1
    assert translated(loader(path="a"))[0] == loader(path="a")  # not LLM Foundry's


def test_a_config_in_the_keys_of_this_package_stays_as_it_is():
    config = read_config(BASE).model_dump(mode="json")
    assert translated(config, 8) == (config, {}, [])


def test_aliases_merge_keys_and_variables_at_the_top(tmp_path):
    """A key that others refer to is a variable; an unknown key without that is an error."""
    path = tmp_path / "config.yaml"
    text = REST.replace("200ba", "${duration}") + "duration: 7ba\n"
    text += "global_seed: 5\nseed: ${global_seed}\n"  # as files had it before `variables`
    shared = "shared: &shared {expansion_ratio: 2, n_layers: 3}\n"
    model = "model: {<<: *shared, name: mpt_causal_lm, n_layers: 2, d_model: 64, n_heads: 2}\n"
    path.write_text(text + shared + model)
    config = load_config(path)
    assert str(config.max_duration) == "7ba"
    assert (config.model["expansion_ratio"], config.model["n_layers"]) == (2, 2)
    assert config.variables == {
        "duration": "7ba",
        "global_seed": 5,
        "shared": {"expansion_ratio": 2, "n_layers": 3},
    }
    path.write_text(text + shared.replace("&shared", "") + "model: {name: dbrx}\n")
    with pytest.raises(ConfigError, match="shared is not a known key"):
        load_config(path)
