"""A folder that is incomplete, unsafe or for another model gives a one-sentence error."""

import json
import pickle
import re

import pytest
import torch
from hf_models import made, mixtral
from safetensors.torch import load_file, save_file

from tokenyard import ConfigError
from tokenyard_models import Dbrx, Mixtral, Mpt, WeightsError, from_hf, to_hf
from tokenyard_models.hf import Folder, load_weights


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A Mixtral folder of several files."""
    folder = tmp_path_factory.mktemp("published") / "model"
    made(mixtral()).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage."""
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def first_file(folder):
    return min(folder.glob("*.safetensors"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def index(folder):
    return folder / "model.safetensors.index.json"


def truncated(folder):
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return rf"{path.name} is not a whole safetensors file \(.*\); copy it anew"


def header_larger_than_the_file(folder):
    path = first_file(folder)
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    return rf"{path.name} is not a whole safetensors file \(.*\); copy it anew"


def missing_file(folder):
    path = first_file(folder)
    path.unlink()
    return rf"{path.name} does not exist, and the folder's index names it"


def tensor_missing_in_the_index(folder):
    edit(
        index(folder),
        lambda content: content["weight_map"].pop("model.layers.1.input_layernorm.weight"),
    )
    return r"does not list model\.layers\.1\.input_layernorm\.weight, which is in model-0.*"


def tensor_only_in_the_index(folder):
    edit(
        index(folder), lambda content: content["weight_map"].update({"x": first_file(folder).name})
    )
    return r"lacks x, which model\.safetensors\.index\.json says is there"


def path_out_of_the_folder(folder):
    edit(index(folder), lambda content: content["weight_map"].update({"x": "../model.safetensors"}))
    return r"sends x to '\.\./model\.safetensors', which is no safetensors file in the folder"


def empty_index(folder):
    index(folder).write_text("{}")
    return "has no weight_map"


def index_that_is_not_json(folder):
    index(folder).write_text("{")
    return "is not JSON"


def change_tensors(folder, change):
    """Put all tensors into one file and change them."""
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def missing_tensor(folder):
    change_tensors(
        folder, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.3.w2.weight")
    )
    return r"lacks model\.layers\.0\.block_sparse_moe\.experts\.3\.w2\.weight$"


def unexpected_tensors(folder):
    change_tensors(
        folder,
        lambda tensors: tensors.update({"model.a": torch.zeros(2), "model.b": torch.zeros(2)}),
    )
    return r"holds model\.a and 1 others, which the model has no use for"


def shape_of_another_model(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(23)}))
    return (
        r"model\.norm\.weight in .*model\.safetensors is \[23\], and config\.json makes it \[24\]"
    )


def quantised_weights(folder):
    change_tensors(
        folder,
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)}),
    )
    return (
        r"model\.norm\.weight in .* is I8; weights are read in F64, F32, F16, BF16, "
        "and quantised ones not at all"
    )


def pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    return (
        r"has weights as pickles \(pytorch_model\.bin\), which can run code when they are read; "
        "convert them"
    )


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return r"holds neither model\.safetensors\.index\.json nor model\.safetensors"


def no_config(folder):
    (folder / "config.json").unlink()
    return r"config\.json does not exist; give a folder that holds config\.json"


def unknown_architecture(folder):
    edit(folder / "config.json", lambda content: content.update(model_type="mixtrel"))
    return (
        r"has model_type 'mixtrel' \(did you mean 'mixtral'\?\); "
        "give a model of one of these: mixtral, qwen3_moe, olmoe, dbrx"
    )


def yarn(folder):
    edit(
        folder / "config.json", lambda content: content["rope_parameters"].update(rope_type="yarn")
    )
    return r"model\.rope_parameters\.rope_type is 'yarn'; give 'default' or 'llama3'"


def quantised_by_config_json(folder):
    method = {"quant_method": "gptq", "bits": 4}
    edit(folder / "config.json", lambda content: content.update(quantization_config=method))
    return r"model\.quantization_config is \{.*\}, which changes what the model computes"


def key_twice_in_the_index(folder):
    one, two = sorted(path.name for path in folder.glob("*.safetensors"))[:2]
    index(folder).write_text(f'{{"weight_map": {{"x": "{one}", "x": "{two}"}}}}')
    return r"index\.json is not JSON: it has the key 'x' twice, with different values"


def key_twice_in_config_json(folder):
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "rms_norm_eps": 0.5}')
    return r"config\.json is not JSON: it has the key 'rms_norm_eps' twice, with different values"


def tensor_in_two_files(folder):
    one, two = sorted(folder.glob("*.safetensors"))[:2]
    doubled = next(iter(load_file(one).items()))
    save_file(load_file(two) | dict([doubled]), two)
    return rf"does not list {re.escape(doubled[0])}, which is in {two.name}"


def weights_that_the_index_does_not_name(folder):
    save_file({"x": torch.zeros(2)}, folder / "model-00009-of-00009.safetensors")
    return r"holds model-00009-of-00009\.safetensors, which the index does not list; remove"


def whole_weights_beside_an_index(folder):
    """transformers would read the other ones."""
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    return r"holds model\.safetensors, which the index does not list; remove"


def adapters(folder):
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    return r"holds adapter_model\.safetensors, and adapters are not read; merge them"


DAMAGES = (
    key_twice_in_the_index,
    key_twice_in_config_json,
    tensor_in_two_files,
    weights_that_the_index_does_not_name,
    whole_weights_beside_an_index,
    adapters,
    truncated,
    header_larger_than_the_file,
    missing_file,
    tensor_missing_in_the_index,
    tensor_only_in_the_index,
    path_out_of_the_folder,
    empty_index,
    index_that_is_not_json,
    missing_tensor,
    unexpected_tensors,
    shape_of_another_model,
    quantised_weights,
    pickles,
    no_weights,
    no_config,
    unknown_architecture,
    yarn,
    quantised_by_config_json,
)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle ran",)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_gives_one_sentence(folder, damage):
    sentence = damage(folder)
    with pytest.raises((WeightsError, ConfigError), match=sentence) as raised:
        from_hf(folder)
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_before_config_json_is_no_fault(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    from_hf(folder)


def test_nothing_is_filled_from_a_folder_of_another_size(folder):
    missing_tensor(folder)
    model = from_hf_sized(folder)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WeightsError):
        load_weights(model, Folder(folder))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def from_hf_sized(folder):
    sizes = json.loads((folder / "config.json").read_text())
    return Mixtral(
        {
            key: sizes[key]
            for key in sizes
            if key.startswith(("num_", "hidden_size", "interm", "vocab"))
        }
    )


def test_a_model_of_another_family(folder):
    with pytest.raises(WeightsError, match="holds a mixtral, and the model is mpt_causal_lm"):
        load_weights(Mpt({"size": "tiny"}), Folder(folder))


def test_what_to_hf_refuses(original, tmp_path):
    model = from_hf(original)
    with pytest.raises(
        WeightsError, match=re.escape(f"{tmp_path} exists already; give the name of a new folder")
    ):
        to_hf(model, tmp_path)
    with pytest.raises(
        WeightsError,
        match="a mpt_causal_lm has no Hugging Face form here; these have: mixtral, qwen3",
    ):
        to_hf(Mpt({"size": "tiny"}), tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"moe_score_function": "sigmoid"}, "moe.rule.score is 'sigmoid', only 'softmax'"),
        ({"mlp_type": "mlp"}, "moe.activation is 'silu', only 'swiglu'"),
        (
            {"uniform_expert_assignment": True},
            "uniform_expert_assignment is True, only False; give a model that was trained without",
        ),
        ({"moe_bias_update_rate": 0.1}, "moe.rule.bias_update_rate is 0.1, only 0.0"),
        ({"moe_weight_scale": 2.0}, "moe.rule.scale is 2.0, only 1.0"),
    ],
)
def test_what_a_config_json_cannot_say_is_not_written(tmp_path, keys, sentence):
    model = Dbrx({"size": "tiny", "ffn_config": keys})
    with pytest.raises(WeightsError, match=re.escape(f"a dbrx folder cannot say that {sentence}")):
        to_hf(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_is_left(original, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokenyard_models.hf._shards.save_file", full)
    with pytest.raises(
        WeightsError, match=r"new cannot be written: No space left .* nothing of it"
    ):
        to_hf(from_hf(original), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_copied(original, tmp_path, folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    to_hf(from_hf(original), tmp_path / "new", like=folder)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_text() == (folder / name).read_text()
