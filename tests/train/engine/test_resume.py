"""A resumed run continues exactly; a config that would change it is refused."""

from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenyard import ConfigError
from tokenyard_train.checkpoint import CheckpointError, read_meta
from tokenyard_train.checkpoint.background import BackgroundWriter
from tokenyard_train.engine import compile as compile_module
from tokenyard_train.engine import resume as module
from tokenyard_train.engine.folder import run_folder
from tokenyard_train.engine.resume import resume, start_from
from tokenyard_train.engine.save import run_tensors, save
from tokenyard_train.engine.state import Position, Run
from tokenyard_train.engine.step import train_step
from tokenyard_train.records.metrics import Metrics

from ..conftest import MODEL

AT_START = Position()


def metrics(setup) -> Metrics:
    return Metrics(setup.folder / "metrics.jsonl")


def saved(setup, position=AT_START):
    writer = BackgroundWriter(setup.folder, keep=-1, background=False, device=setup.device)
    save(Run(setup, metrics(setup), position), writer)
    return writer.finish()


def resumed(setup) -> Position:
    return resume(setup, metrics(setup))


def check_continues_bit_for_bit(build, changes):
    """Save a run after three steps; the fourth is the same in a run that resumes."""
    run = build(**changes)
    run.convert_weights()
    for batch in range(3):
        train_step(run, batch)
    saved(run, Position(batch=3))
    again = build(**changes, autoresume=True)
    assert resumed(again) == Position(batch=3)
    again.convert_weights()
    assert train_step(again, 3).result == train_step(run, 3).result
    tensors = run_tensors(again)
    for key, tensor in run_tensors(run).items():
        assert torch.equal(tensor, tensors[key]), key


def test_autoresume_without_a_checkpoint_starts_a_new_run(build):
    assert resumed(build(autoresume=True)) == Position()


NARROW = {"ffn_hidden_size": 128, "moe_ffn_hidden_sizes": [64, 128, 128, 64]}


@pytest.mark.parametrize("ffn", [{}, NARROW], ids=["equal", "different widths"])
def test_state_and_position_are_restored(build, ffn):
    model = MODEL | {"ffn_config": MODEL["ffn_config"] | ffn}
    run = build(model=model)
    for batch in range(3):
        train_step(run, batch)
    saved(run, Position(batch=3, skipped_in_a_row=1))
    again = build(model=model, autoresume=True)
    assert resumed(again) == Position(batch=3, skipped_in_a_row=1)
    assert train_step(again, 3).result == train_step(run, 3).result
    for a, b in zip(run.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(run.optimizer.state[a][key], again.optimizer.state[b][key])


OPTIONS = {
    "sums": {"device_train_microbatch_size": 1, "backends": {"experts": "torch"}},
    "whole recompute": {"activation_checkpointing": True},
    "selective, offload": {"activation_checkpointing": "selective", "activation_cpu_offload": True},
    "compiled": {"compile": True},
    "clipped": {"algorithms": {"gradient_clipping": {"clipping_threshold": 0.01}}},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_the_step_resumes_bit_for_bit(build, monkeypatch, changes, precision):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compile_module, "missing_compiler", lambda device: None)
    check_continues_bit_for_bit(build, changes | {"precision": precision})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": MODEL | {"n_layers": 3}},
            "model.n_layers is 3, but checkpoint .*ba0 was made with 2",
        ),
        ({"load_path": "other"}, "load_path is 'other', but checkpoint .* was made with None"),
        (
            {"model": {"name": "mixtral", "size": "tiny"}},
            "model.name is 'mixtral', but checkpoint .*ba0 was made with 'dbrx'",
        ),
        (
            {"train_loader": {"name": "python_stdlib"}},
            "train_loader.name is 'python_stdlib', but .*ba0 was made with 'text'",
        ),
        ({"seed": 5}, "seed is 5, but checkpoint .* was made with 17; set it back"),
        ({"global_train_batch_size": 8}, "global_train_batch_size is 8, but .* was made with 4"),
        (
            {"optimizer": {"name": "adamw"}},
            "optimizer.name is 'adamw', but .* was made with 'decoupled_adamw'",
        ),
        (
            {"optimizer": {"name": "muon"}},
            "optimizer.name is 'muon', but .* was made with 'decoupled_adamw'",
        ),
    ],
)
def test_a_config_that_disagrees_is_named(build, changes, sentence):
    saved(build())
    with pytest.raises(CheckpointError, match=sentence):
        resumed(build(autoresume=True, **changes))


@pytest.mark.parametrize(
    "written_out",
    [
        {"n_layers": 2, "resid_pdrop": 0.0},
        {"attn_config": {"rope_theta": 10000.0}},
        {"ffn_config": MODEL["ffn_config"] | {"moe_jitter_eps": 0, "ffn_act_fn": {"name": "silu"}}},
    ],
)
def test_a_default_of_the_model_that_is_written_out_is_no_change(
    build, config, written_out, caplog, tmp_path
):
    run = build()
    saved(run)
    model = MODEL | written_out
    assert resumed(build(autoresume=True, model=model)) == Position()
    new = config(model=model, save_folder=str(tmp_path / "other"))
    start_from(run.model, str(run.folder), new)
    assert "load_path" not in caplog.text


def test_changed_values_of_the_training_are_told(build, caplog):
    saved(build())
    resumed(build(autoresume=True, optimizer={"lr": 0.5}, max_duration="7ba"))
    assert "with other values: max_duration is '7ba' (was '6ba'), optimizer.lr is 0.5" in (
        caplog.text
    )
    caplog.clear()
    resumed(build(autoresume=True, console_log_interval="3ba"))
    assert "other values" not in caplog.text


@pytest.fixture
def older(monkeypatch):
    """Read checkpoints as if an older version with fewer keys had written them."""

    def without_new_keys(folder):
        meta = read_meta(folder)
        del meta["config"]["lora"], meta["config"]["train_loader"]["dataset"]["suffixes"]
        return meta

    monkeypatch.setattr(module, "read_meta", without_new_keys)


def test_a_key_that_the_checkpoint_lacks_had_its_default(build, older):
    saved(build())
    assert resumed(build(autoresume=True)) == Position()
    with pytest.raises(
        CheckpointError, match=r"lora is \{.*\}, but checkpoint .*ba0 was made with None"
    ):
        resumed(build(autoresume=True, lora={"rank": 2}))


def test_expert_parallelism_may_change_under_either_key(build):
    shared = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_world_size": 1}}
    saved(build(model=shared))
    assert resumed(build(autoresume=True)) == Position()


def test_backends_microbatch_and_duration_may_change(build):
    saved(build())
    changes = {
        "backends": {"experts": "loop"},
        "device_train_microbatch_size": 1,
        "max_duration": "9ba",
    }
    assert resumed(build(autoresume=True, **changes)) == Position()


def test_load_path_gives_a_new_run_its_weights(build, tmp_path):
    run = build()
    train_step(run, 0)
    saved(run)
    for path in (run.folder, run.folder / "ba0"):
        fresh = build(seed=5, save_folder=str(tmp_path / "other"))
        start_from(fresh.model, str(path))
        assert all(
            torch.equal(a, b) for a, b in zip(run.model.parameters(), fresh.model.parameters())
        )
        assert not fresh.optimizer.state


def test_load_path_of_another_model_is_refused(build, tmp_path):
    saved(build())
    other = build(model=MODEL | {"d_model": 32}, save_folder=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"checkpoint .*ba0 is of another model: .*"):
        start_from(other.model, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("nowhere", "'.*nowhere' does not exist"), ("text", "holds no checkpoint")],
)
def test_load_path_without_a_checkpoint(build, tmp_path, path, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        start_from(build().model, str(tmp_path / path))


@pytest.fixture
def words(tmp_path):
    """The path of a tokenizer.json of 257 ids."""
    vocab = {f"w{i}": i for i in range(256)} | {"</s>": 256}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return {"name": str(tmp_path / "tokenizer.json"), "eos_token": "</s>"}


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tokenyard"]


def test_the_tokenizer_of_a_checkpoint_is_not_guessed(build, config, words, tmp_path, caplog):
    run = build(tokenizer=words)
    saved(run)
    other = {"save_folder": str(tmp_path / "other")}
    sentence = r"was trained with the tokenizer '.*tokenizer\.json', and the config names none"
    with pytest.raises(CheckpointError, match=sentence):
        start_from(run.model, str(run.folder), config(**other))
    start_from(run.model, str(run.folder), config(tokenizer=words, **other))
    assert "load_path" not in caplog.text
    start_from(run.model, str(run.folder), config(tokenizer={"name": "bytes"}, **other))
    assert "tokenizer.name is 'bytes', but load_path" in caplog.text


def test_other_keys_of_the_model_are_named(build, config, caplog):
    run = build()
    saved(run)
    model = MODEL | {"ffn_config": MODEL["ffn_config"] | {"moe_top_k": 1}}
    start_from(run.model, str(run.folder), config(model=model, max_seq_len=12))
    assert [message.partition(",")[0] for message in warnings_of(caplog)] == [
        "model.ffn_config.moe_top_k is 1"
    ]


def test_a_renamed_checkpoint_is_refused(build):
    path = saved(build(), Position(batch=3))
    path.rename(path.with_name("ba30"))
    said = r"checkpoint .*ba30 is of batch 3, as its run.json says; .* name back, ba3$"
    with pytest.raises(CheckpointError, match=said):
        resumed(build(autoresume=True))


def test_a_save_folder_that_is_a_file_is_named(config, text):
    with (
        pytest.raises(ConfigError, match=r"save_folder '.*a\.txt' is a file; give the name"),
        run_folder(config(save_folder=str(text / "a.txt"))),
    ):
        pass
