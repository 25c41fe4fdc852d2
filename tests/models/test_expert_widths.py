"""Experts of different widths, chosen in the model's section of a config."""

import pytest
import torch

from tokenyard import ConfigError, count_parameters
from tokenyard_models import Dbrx, to_hf
from tokenyard_models.hf import WeightsError

WIDTHS = [64, 128, 64, 64]
FFN = {
    "ffn_hidden_size": 128,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_ffn_hidden_sizes": WIDTHS,
}
ATTENTION = {"kv_n_heads": 1}
CONFIG = {"size": "tiny", "d_model": 32, "n_heads": 2, "n_layers": 2, "attn_config": ATTENTION}


def model(**changes) -> Dbrx:
    return Dbrx(CONFIG | {"ffn_config": FFN | changes})


def test_only_weights_within_the_widths_count():
    narrow, wide = model(), model(moe_ffn_hidden_sizes=None)
    assert narrow.blocks[0].ffn.chosen["experts"].backend.name == "sparse"
    size, all_wide = count_parameters(narrow), count_parameters(wide)
    assert size.experts == 2 * sum(3 * 32 * width for width in WIDTHS)
    unused = all_wide.experts - size.experts
    assert all_wide.total - size.total == unused
    assert all_wide.active - size.active == unused / 2
    assert wide.flops_per_token(16) - narrow.flops_per_token(16) == 2 * unused / 2


def test_weights_past_a_width_have_no_effect():
    torch.manual_seed(0)
    narrow = model()
    ids = torch.randint(0, 257, (2, 16))
    want = narrow(ids)
    for block in narrow.blocks:
        block.ffn.experts.up.data.view(4, 2, 128, 32)[0, :, 64:] = torch.nan
        block.ffn.experts.down.data[0, :, 64:] = torch.nan
    assert torch.equal(narrow(ids).logits, want.logits)


@pytest.mark.parametrize("widths", [[64, 128], [64, 64, 64, 64], [0, 128, 64, 64], []])
def test_widths_that_do_not_fit(widths):
    sentence = "moe_ffn_hidden_sizes is .*; give 4 widths, one for each expert, of which the la"
    with pytest.raises(ConfigError, match=sentence):
        model(moe_ffn_hidden_sizes=widths)


def test_a_folder_of_transformers_cannot_hold_them(tmp_path):
    with pytest.raises(WeightsError, match=r"a dbrx folder cannot say that moe.ffn_dims is \(64,"):
        to_hf(model(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
