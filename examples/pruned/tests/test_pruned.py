import pytest

from tokenyard import ConfigError, count_parameters
from tokenyard.testing import ModelConformance


class TestPrunedLlama(ModelConformance):
    backend = "pruned_llama"
    config = {"size": "tiny", "max_seq_len": 32, "density": 0.5}


def test_a_quarter_of_the_weights_exists():
    from pruned_llama.model import PrunedLlama

    full, quarter = (PrunedLlama({"size": "tiny", "density": d}) for d in (1.0, 0.25))
    sizes = [sum(p.numel() for p in m.blocks[0].ffn.parameters()) for m in (full, quarter)]
    # up: 1 of 2 blocks of a row, because none would be too few; down: 1 of 4
    assert sizes == [3 * 128 * 256, 3 * 128 * 256 * 5 // 12]
    assert count_parameters(quarter).total < count_parameters(full).total


@pytest.mark.parametrize("key", [{"density": 0}, {"density": "half"}, {"block": 32}])
def test_wrong_keys_are_one_sentence(key):
    from pruned_llama.model import PrunedLlama

    with pytest.raises(ConfigError, match=f"model.{next(iter(key))} is"):
        PrunedLlama({"size": "tiny"} | key)
