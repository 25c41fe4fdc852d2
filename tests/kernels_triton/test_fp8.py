"""The experts of `precision: fp8`; on a CPU with the matmuls in an interpreter of the tests."""

import copy

import pytest
import torch

from tokenyard import Backend, ConfigError, MoE, Registry, Workload, hookimpl, packed_rows
from tokenyard.adapter import LoraSettings
from tokenyard.count import weight_copies
from tokenyard.fp8 import quantize_rows, quantize_weights
from tokenyard.interfaces import ExpertWeights
from tokenyard.lora import add_lora
from tokenyard.measure.memory import saved_bytes
from tokenyard.moe import allow_weight_copies
from tokenyard.registry import Plugin
from tokenyard.testing import Fp8ExpertsConformance
from tokenyard.testing._in_layer import _OneKindRegistry
from tokenyard_kernels_triton import _plugin
from tokenyard_kernels_triton.experts import GluonExperts
from tokenyard_kernels_triton.ops import _fp8_weights, _packed_rows, _quantize

from . import gluon_interpreter


@pytest.fixture(autouse=True)
def nothing_kept():
    _fp8_weights._entries.clear()


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def only_16_bits(workload):
    if workload.dtype not in (torch.bfloat16, torch.float16):
        return "Gluon computes in 16 bits"
    return _plugin.no_triton(workload)


class Offer:
    @staticmethod
    @hookimpl
    def tokenyard_experts():
        path = "tokenyard_kernels_triton.experts:GluonExperts"
        return [Backend("interpreted", path, unusable=only_16_bits)]


class Interpreted(Fp8ExpertsConformance):
    """The kit on a CPU. It takes minutes, so only some tests are called."""

    backend = "interpreted"
    device = "cpu"
    tile = 32

    def __init__(self, save="fp8", **options):
        self.options = {"precision": "fp8", "save": save, **options}

    def registry(self):
        return Registry([Plugin(Offer, "interpreted", "1.0")])


@pytest.fixture
def interpreter(monkeypatch):
    gluon_interpreter.install(monkeypatch)


def record(name, value):
    """Replace pytest's record_property."""


needs_a_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the whole kit")


@needs_a_cpu
@pytest.mark.parametrize(
    ("save", "dtype", "activation", "bias"),
    [
        ("fp8", torch.bfloat16, "swiglu", False),
        ("pre_activation", torch.bfloat16, "swiglu(limit=2.5)", True),
        ("recompute", torch.float16, "gelu", True),
    ],
)
def test_the_layer_is_near_the_emulated_one(interpreter, save, dtype, activation, bias):
    Interpreted(save).test_matches_oracle(dtype, activation, bias, record)


@needs_a_cpu
@pytest.mark.parametrize("routing", ["all to one expert", "empty experts"])
def test_weight_gradients_in_fp8(interpreter, routing):
    """Blocks of 128 rows never hold rows of two experts, and experts without rows get zeros."""
    Interpreted(weight_gradients="fp8").test_routings(routing, 3, record)


@needs_a_cpu
def test_dropped_slots_are_not_read(interpreter):
    Interpreted().test_static_rows_bound(record)


@needs_a_cpu
@pytest.mark.parametrize("wanted", ["x", "up_bias", "down"])
def test_one_gradient_alone(interpreter, wanted):
    Interpreted().test_one_gradient_alone(wanted, record)


@needs_a_cpu
def test_the_epilogue_quantizes_zeros_tiny_numbers_nan_and_infinity(interpreter):
    kit = Interpreted()
    kit.test_zeros_and_tiny_numbers()
    for number in (float("nan"), -float("inf")):
        kit.test_no_number_hides_nan_or_infinity(number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_are_quantized_by_the_recipe(dtype):
    tokens = torch.randn(37, 384, device=DEVICE).to(dtype)
    tokens[3, 200] = float("nan")
    tokens[4, 200] = float("inf")
    tokens[5] = 0
    _same(_quantize.quantize_tokens(tokens), quantize_rows(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("count", "dim"), [(37, 384), (5, 2176)])
def test_packed_rows_are_those_of_the_recipe(dtype, count, dim):
    """Numbers, scales and what they become again, also where a row has two programs."""
    rows = torch.randn(count, dim, device=DEVICE).to(dtype)
    for row, number in enumerate((float("nan"), float("-inf"), 0.0)):
        rows[row, 100 : None if number == 0 else 101] = number
    packed, want = _packed_rows.pack_rows(rows), packed_rows.pack_plainly(rows)
    assert packed.shape == want.shape
    assert _packed_rows.pack_rows(rows[:0]).shape == want[:0].shape
    _same(_parts(packed), _parts(want))
    got = _packed_rows.unpack_rows(want, dtype)
    assert got.dtype == dtype
    # the interpreter reads NaN in e4m3 as 480
    read = torch.ones_like(got).bool() if DEVICE == "cuda" else ~_parts(want)[0].float().isnan()
    want = packed_rows.unpack_plainly(want, dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[read], want[read], rtol=eps, atol=0, equal_nan=True)


def _parts(packed):
    """Return the numbers and the scales of packed rows."""
    dim = packed_rows.unpacked_width(packed.shape[1])
    scales = packed[:, dim:].contiguous().view(torch.float32)
    return packed[:, :dim].view(torch.float8_e4m3fn), scales


def test_weights_are_quantized_by_the_recipe_in_both_layouts():
    weights = torch.randn(2, 256, 384, device=DEVICE, dtype=torch.bfloat16)
    weights[1, :128] *= 1000
    got = _quantize.quantize_weights(weights, forward=True, backward=True)
    want = quantize_weights(weights)
    _same((got.values, got.scales), want)
    assert torch.equal(got.transposed.float(), got.values.float().mT)
    only = _quantize.quantize_weights(weights, forward=False, backward=True)
    assert only.values is None
    assert torch.equal(only.transposed.float(), got.transposed.float())


def _same(got, want):
    """Compare values and scales. The interpreter cuts numbers of e4m3 below 2^-6, on a CPU."""
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0, equal_nan=True)
    values, expected = got[0].float(), want[0].float()
    assert torch.equal(values.isnan(), expected.isnan())
    difference = (values - expected).nan_to_num()
    assert difference.norm() < 1e-3 * expected.nan_to_num().norm()


def weight():
    return torch.nn.Parameter(torch.randn(1, 128, 128, device=DEVICE, dtype=torch.bfloat16))


def test_weights_are_quantized_again_when_they_change():
    one, other = weight(), weight()
    kept = _fp8_weights.kept_weights(one)
    assert _fp8_weights.kept_weights(other) is not kept
    assert _fp8_weights.kept_weights(one) is kept
    with torch.no_grad():
        one.mul_(2)
    again = _fp8_weights.kept_weights(one)
    assert torch.equal(again.scales, 2 * kept.scales)
    assert _fp8_weights.kept_weights(one) is again


def test_a_step_of_an_optimizer_drops_all():
    """Even if it writes by addresses, or through `data`, without a new version."""
    one = weight()
    kept = _fp8_weights.kept_weights(one)
    optimizer = torch.optim.SGD([one])
    one.data.mul_(2)
    assert _fp8_weights.kept_weights(one) is kept
    optimizer.step()
    assert torch.equal(_fp8_weights.kept_weights(one).scales, 2 * kept.scales)


def test_a_new_weight_in_the_memory_of_a_freed_one_is_quantized():
    """Same address, same version, other numbers."""
    for _ in range(5):
        one = weight().detach()
        got = _fp8_weights.kept_weights(one)
        assert torch.equal(got.scales, quantize_weights(one).scales)
        del one
    assert len(_fp8_weights._entries) <= 2  # the others are dropped


@needs_a_cpu
def test_another_storage_at_the_same_address_is_quantized():
    """Both live: an emptied storage, as FSDP leaves it, gives its address to another one."""
    memory = torch.randn(1, 128, 128).numpy()
    one = torch.from_numpy(memory)
    kept = _fp8_weights.kept_weights(one)
    memory *= 2
    other = torch.from_numpy(memory)
    assert other.data_ptr() == one.data_ptr()
    assert torch.equal(_fp8_weights.kept_weights(other).scales, 2 * kept.scales)


def test_another_stream_quantizes_again(monkeypatch):
    """It would read numbers that the first stream may not have written yet."""
    one = weight()
    kept = _fp8_weights.kept_weights(one)
    monkeypatch.setattr(_fp8_weights, "current_stream", lambda device: 7)
    again = _fp8_weights.kept_weights(one)
    assert again is not kept
    assert _fp8_weights.kept_weights(one) is again
    assert len(_fp8_weights._entries) == 1


def test_old_numbers_are_freed_before_new_ones_are_made(monkeypatch):
    one = weight()
    _fp8_weights.kept_weights(one)
    with torch.no_grad():
        one.mul_(2)

    def quantize(*args, **kwargs):
        assert not _fp8_weights._entries
        return quantize_weights(one)

    monkeypatch.setattr(_fp8_weights, "quantize_weights", quantize)
    _fp8_weights.kept_weights(one)


def test_graphs_read_memory_that_is_renewed_in_place(monkeypatch):
    """Also after a step of an optimizer, which drops what no graph reads."""
    one, other = weight(), weight()
    _fp8_weights.renew_weights(one.detach())
    _fp8_weights.kept_weights(other)
    with monkeypatch.context() as capture:
        capture.setattr(_fp8_weights, "_capturing", lambda tensor: True)
        assert _fp8_weights.kept_weights(one) is None  # of a graph whose owner renews nothing
        assert _fp8_weights.kept_weights(other, captured=True) is None
        captured = _fp8_weights.kept_weights(one, captured=True)
    address = captured.values.data_ptr()
    for renew in (_fp8_weights.renew_weights, _fp8_weights.kept_weights):
        before = captured.scales.clone()
        one.data.mul_(2)
        torch.optim.SGD([other]).step()
        assert len(_fp8_weights._entries) == 1
        assert torch.equal(captured.scales, before)
        renew(one)
        assert torch.equal(captured.scales, 2 * before)
    assert captured.values.data_ptr() == address
    monkeypatch.setattr(_fp8_weights, "current_stream", lambda device: 7)
    assert _fp8_weights.kept_weights(one) is None


def test_tensors_without_a_version_are_not_kept():
    with torch.inference_mode():
        assert _fp8_weights.kept_weights(torch.randn(1, 128, 128, device=DEVICE)) is None


def interpreted_layer(dtype=torch.bfloat16, device="cpu", **options):
    workload = Workload(256, 128, 4, 2, dtype=torch.bfloat16, device=device)
    request = {"name": "interpreted", "precision": "fp8", **options}
    registry = _OneKindRegistry(Interpreted().registry(), "experts")
    parts = {"experts": request, "router": "torch", "permutation": "torch"}
    return MoE(workload, backends=parts, registry=registry, dtype=dtype)


@needs_a_cpu
def test_a_checkpoint_holds_the_weights_as_they_are_trained(interpreter):
    """FP8 copies are kept by the kernels' package, and never by a module."""
    moe = interpreted_layer()
    allow_weight_copies(moe)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    y, _ = moe(torch.randn(5, 256, dtype=torch.bfloat16))
    y.sum().backward()
    assert len(_fp8_weights._entries) == 2
    state = moe.state_dict()
    assert set(state) == {"router.weight", "experts.up", "experts.down"}
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in copy.deepcopy(moe).state_dict().values()} == {torch.bfloat16}
    assert len(_fp8_weights._entries) == 2


@needs_a_cpu
def test_nothing_is_kept_until_a_strategy_says_that_weights_have_versions(interpreter):
    """FSDP gathers other weights into the same memory, without a new version."""
    moe = interpreted_layer()
    y, _ = moe(torch.randn(5, 256, dtype=torch.bfloat16))
    y.sum().backward()
    assert not _fp8_weights._entries


@needs_a_cpu
def test_nothing_is_kept_of_casts_under_autocast(interpreter):
    """A compiler may write the cast of another layer into the same memory, without a version."""
    moe = interpreted_layer(dtype=torch.float32)
    allow_weight_copies(moe)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = moe(torch.randn(5, 256))
    y.sum().backward()
    assert not _fp8_weights._entries
    assert weight_copies(moe) == 0


@needs_a_cpu
@pytest.mark.parametrize("save", ["fp8", "pre_activation", "recompute"])
def test_estimates_of_memory_are_exact(interpreter, save):
    moe = interpreted_layer(save=save)
    allow_weight_copies(moe)
    x = torch.randn(5, 256, dtype=torch.bfloat16, requires_grad=True)
    plan = moe.experts.permutation.plan(torch.arange(10, dtype=torch.int32).view(5, 2) % 4, 4)
    weights = ExpertWeights(moe.experts.up, moe.experts.down)
    without = (x, moe.experts.up, moe.experts.down, *plan[:3])
    saved = saved_bytes(lambda: moe.experts.kernel(x, plan, None, weights), without)
    assert saved == 10 * moe.experts.kernel.saved_bytes_per_row(2)
    copies = [e.weights for e in _fp8_weights._entries.values()]
    assert sum(t.nbytes for one in copies for t in one) == weight_copies(moe)


def test_qwen3_saves_524_mib():
    """T 32768, D 2048, F 768, K 8: x [T, D] in 16 bits, z [R, 2F] in 8, and its scales."""
    kernel = GluonExperts(Workload(2048, 768, 128, 8), None, precision="fp8")
    assert 32768 * (2 * 2048 + 8 * kernel.saved_bytes_per_row(2)) == 524 * 2**20


def test_options_are_checked():
    workload = Workload(256, 128, 4, 2, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"experts\.precision is 'fp4'; known is: fp8"):
        GluonExperts(workload, None, precision="fp4")
    with pytest.raises(ConfigError, match=r"'gluon' is unusable here: .* ffn_dim is 136"):
        GluonExperts(Workload(256, 136, 4, 2), None, precision="fp8")
    with pytest.raises(ConfigError, match=r"weight_gradients is 'fp8'; known is: fp8, with prec"):
        GluonExperts(workload, None, weight_gradients="fp8")
    with pytest.raises(ConfigError, match=r"weight_gradients is 'fp4'; known is: fp8, with prec"):
        GluonExperts(workload, None, precision="fp8", weight_gradients="fp4")
    assert GluonExperts(workload, None).save == "pre_activation"
    assert GluonExperts(workload, None, precision="fp8").save == "fp8"
    assert GluonExperts(workload, None, "recompute", "fp8").save == "recompute"


@pytest.mark.parametrize("rank", [8, 512])
def test_adapters_are_refused(rank):
    """Of any rank: core, which computes those of high ranks, would do so in 16 bits."""
    moe = interpreted_layer(device=DEVICE)
    add_lora(moe, LoraSettings(rank, alpha=rank), ["experts.*"])
    refused = pytest.raises(
        ConfigError, match="precision is fp8, and experts with adapters have none"
    )
    with refused:
        moe(torch.randn(5, 256, dtype=torch.bfloat16, device=DEVICE))
    with refused:
        moe.experts.prepare(5)


@pytest.mark.gpu
class TestGluonExpertsInFp8(Fp8ExpertsConformance):
    backend = "gluon"
    tile = 128


@pytest.mark.gpu
class TestGluonExpertsInFp8ThatSaveThePreActivation(Fp8ExpertsConformance):
    backend = "gluon"
    options = {"precision": "fp8", "save": "pre_activation"}
    tile = 128
    dim = 640
    ffn_dim = 384


@pytest.mark.gpu
class TestWideGluonExpertsInFp8ThatRecompute(Fp8ExpertsConformance):
    backend = "gluon"
    options = {"precision": "fp8", "save": "recompute"}
    tile = 128
    ffn_dim = 1408


@pytest.mark.gpu
class TestGluonExpertsWithWeightGradientsInFp8(Fp8ExpertsConformance):
    backend = "gluon"
    options = {"precision": "fp8", "weight_gradients": "fp8"}
    tile = 128
    ffn_dim = 384
