"""A family is one module and one entry of FAMILIES: everything else follows from them."""

from pathlib import Path

import pytest
import torch

from tokenyard.registry import Registry, installed_plugins
from tokenyard_models import from_hf, to_hf
from tokenyard_models.families import FAMILIES, load_module, readme_table

README = Path(__file__).parents[2] / "packages" / "models" / "README.md"
ACME = '''
from pydantic import Field

from tokenyard_models.families._config_json import llama_keys
from tokenyard_models.families._definition import Definition
from tokenyard_models.families._format import HfFormat
from tokenyard_models.families._hf_keys import LlamaKeys
from tokenyard_models.families._names import DENSE


class AcmeConfig(LlamaKeys):
    """Acme's keys."""

    vocab_size: int = Field(40, ge=1)
    hidden_size: int = Field(16, ge=1)
    intermediate_size: int = Field(24, ge=1)
    num_hidden_layers: int = Field(2, ge=1)
    num_attention_heads: int = Field(4, ge=1)

    def resolve(self):
        return self.transformer(moe=None, dense_ffn_dim=self.intermediate_size)


class Acme(Definition):
    definition = "acme"
    schema = AcmeConfig
    readme = ("Acme's config.json", "`size: full` or `tiny`")
    tiny = {"hidden_size": 8}


def config_json(config):
    keys = llama_keys(config, "AcmeForCausalLM", "acme")
    return keys | {"intermediate_size": config.dense_width}


FORMATS = (HfFormat(Acme, "acme", DENSE, config_json, defaults={"num_hidden_layers": 3}),)
'''


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Add the family `acme`, and return a registry of the plugins as a new process would see it."""
    (tmp_path / "acme_family.py").write_text(ACME)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES, "acme", "acme_family:Acme")
    return Registry(*installed_plugins())


def test_configs_choose_it_by_name(registry):
    model = registry.choose("model", "acme").construct({"size": "tiny"})
    assert model.config.dim == 8
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 40)


def test_its_hugging_face_folders_are_written_and_read(registry, tmp_path):
    model = registry.choose("model", "acme").construct({})
    model.init_weights(seed=1)
    to_hf(model, tmp_path / "folder")
    loaded = from_hf(tmp_path / "folder", registry=registry)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))


def test_keys_that_a_folder_leaves_out_have_the_defaults_of_transformers(registry):
    (hf_format,) = load_module("acme").FORMATS
    section = hf_format.section({"model_type": "acme", "hidden_size": 12})
    assert section == {"num_hidden_layers": 3, "hidden_size": 12}


def test_the_table_has_a_row_of_it(registry):
    assert readme_table().splitlines()[-1] == (
        "| `acme` | Acme's config.json | `size: full` or `tiny` |"
    )


def test_the_readme_has_the_table():
    """If this test fails, replace the README's table by what `readme_table` returns."""
    assert readme_table() in README.read_text(encoding="utf-8"), "\n" + readme_table()
