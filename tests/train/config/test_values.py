"""Values without meaning are refused before the first step, each in one sentence with its key."""

import pytest
import yaml

REFUSED = {
    # Booleans, text and floats where a whole number is meant
    "seed=true": "seed is True; give a whole number",
    "seed='\"17\"'": "seed is '\"17\"'; give a whole number",
    "max_seq_len=true": "max_seq_len is True; give a whole number",
    "global_train_batch_size=8.0": "global_train_batch_size is 8.0; give a whole number",
    "device_train_microbatch_size=true": "device_train_microbatch_size is True; give a whole",
    "lora.rank=8.0": "lora.rank is 8.0; give a whole number",
    "model.n_layers=true": "n_layers is True; give a whole number",
    "model.ffn_config.moe_top_k=2.0": "moe_top_k is 2.0; give a whole number",
    "optimizer.lr=true": "optimizer.lr is True; give a number",
    "seed=190:20:30": "190:20:30 is a number of base 60",
    "seed=010": "010 is a number of base 8 in YAML; write",
    "train_loader.dataset.path=my-texts #1": "'#1' is a comment in YAML; put the value in quotes",
    "run_name=#1": "'#1' is a comment in YAML; put the value in quotes",
    # A model, a schedule and an optimizer that train nothing
    "model.name=auto": "model.name is 'auto', which could be any model",
    "scheduler.t_max=0ba": "scheduler.t_max is 0ba; it must be above 0",
    "scheduler.t_warmup=1e18ba": "a duration is at most 1e.15",
    "scheduler.t_warmup=1e300dur": "a duration is at most 1e.15",
    "optimizer.lr=1e30": "optimizer.lr is 1e.30; give a number at most 1000",
    "optimizer.weight_decay=1e308": "optimizer.weight_decay is 1e.308; give a number at most",
    "optimizer.eps=1e308": "optimizer.eps is 1e.308; give a number at most 1",
    "optimizer.betas=[0.9999999999999999,0.9]": "betas.0 is 0.9999999999999999: it leaves nothing",
    "algorithms.gradient_clipping.clipping_threshold=1e-300": "clipping_threshold is 1e-300; give",
    # Numbers that float32 does not hold, or not their products
    "model.ffn_config.moe_loss_weight=1e308": "moe_loss_weight is 1e.308; give 0, or a number from",
    "model.ffn_config.moe_zloss_weight=1e38": "moe_zloss_weight is 1e.38; give 0, or a number from",
    "model.ffn_config.moe_weight_scale=1e-300": "moe_weight_scale is 1e-300; give 0, or a number",
    "model.attn_config.clip_qkv=1e-300": "clip_qkv is 1e-300; give 0, or a number from",
    "model.attn_config.rope_theta=1e308": "rope_theta is 1e.308; give 0, or a number from",
    "optimizer.eps=1e-300": "optimizer.eps is 1e-300; give 0, or a number from",
    "lora.alpha=1e-300": "lora.alpha is 1e-300; give 0, or a number from",
    # Batches that no memory holds
    "global_train_batch_size=1000000000": "global_train_batch_size is 10+, whose token ids take",
    "device_eval_batch_size=1000000000": "device_eval_batch_size is 10+, whose token ids take",
    # Durations
    "max_duration=1e308ep": "max_duration is '1e308ep': a duration is at most",
    "max_duration=1e17tok": "max_duration is '1e17tok': a duration is at most",
    "eval_interval=0.1ba": "eval_interval is '0.1ba': ba counts whole batches",
    "save_interval=1.5ba": "save_interval is '1.5ba': ba counts whole batches",
    # What would fail after the last step
    "callbacks.generate_callback.temperature=1e-320": "temperature is 1e-320: give 0 .greedy",
    # Paths
    "load_path=" + "a" * 400: "cannot be used: File name too long",
    "train_loader.dataset.path=" + "a" * 302: "File name too long",
    "save_folder=" + "a" * 400: "cannot be written: File name too long",
}


@pytest.mark.parametrize("override", REFUSED, ids=lambda text: text[:40])
def test_a_value_without_meaning_is_refused(override, tokenyard, settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    code, _, error = tokenyard("train", str(path), override)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=REFUSED[override]):
        raise ValueError(error)
    assert not list((tmp_path / "run").glob("ba*"))


@pytest.mark.parametrize("name", ["eval_interval", "save_interval"])
@pytest.mark.parametrize("span", ["0.0001dur", "0.001ep", "0.01dur"])
def test_an_interval_of_less_than_a_step_is_a_warning(
    name, span, tokenyard, settings, tmp_path, caplog
):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    code, _, _ = tokenyard("check", str(path), f"{name}={span}")
    assert code == 0
    assert f"{name} is {span}, less than a step, which means after every step" in caplog.text


@pytest.mark.parametrize("text", ["5", "text", "[1]", "null", "true"])
def test_a_file_without_keys_is_no_config(text, tokenyard, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    code, _, error = tokenyard("check", str(path))
    assert code == 2
    assert "a config is a mapping of keys to values" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a" * 400),
        ("convert", "a" * 400, "out"),
        ("convert", "out", "a" * 400),
        ("check", "a" * 400),
        ("data", "pack", "out", "a" * 400),
        ("data", "info", "a" * 400),
        *(
            ("generate", "run", option, "99999999999999999999")
            for option in ("--seed", "--max-new-tokens", "--temperature")
        ),
        ("check", "config.yaml", "--nproc", "99999999999"),
        ("launch", "config.yaml", "--max-restarts", "99999999999"),
        ("launch", "config.yaml", "--nproc", "99999999999"),
        ("upcycle", "dense", "out", "--num-experts", "99999999999", "--top-k", "1"),
        ("upcycle", "dense", "out", "--num-experts", "4", "--top-k", "99999999999"),
        ("data", "pack", "out", "config.yaml", "--workers", "99999999"),
        ("routing", "run", "--data", "text", "--tokens", "99999999999999999999"),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_an_argument_out_of_range_is_a_mistake(arguments, tokenyard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = tokenyard(*arguments)
    assert code == 2
    assert "Traceback" not in error


@pytest.mark.parametrize("timeout", ["1e300", "-1", "0", ".nan", ".inf", "x", "[]"])
@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_a_timeout_that_no_collective_has_is_refused(name, timeout, tokenyard, settings, tmp_path):
    pytest.importorskip("tokenyard_parallel")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    override = f"parallel.strategy={{name: {name}, timeout: {timeout}}}"
    code, _, error = tokenyard("check", str(path), override)
    assert code == 2
    assert "timeout" in error
    assert error.count("\n") == 1
