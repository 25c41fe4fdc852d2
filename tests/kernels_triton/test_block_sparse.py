"""Block-sparse matmuls against float64 dense ones; in the interpreter on a CPU."""

import random

import pytest
import torch

from tokenyard import ConfigError
from tokenyard.testing._compare import CustomOps, fresh
from tokenyard.tolerance import allowed_error, relative_error
from tokenyard_kernels_triton import block_sparse
from tokenyard_kernels_triton.block_sparse import BlockSparse, _ops, dds, dsd, reference, sdd
from tokenyard_kernels_triton.block_sparse._tiling import Tiling

from . import gluon_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOPOLOGIES = 200
CASES = TOPOLOGIES // 5 if DEVICE == "cuda" else 4  # of each part, in Gluon
PARTS = [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, 5))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_mask(rng: random.Random) -> torch.Tensor:
    """Return which blocks exist: at random, none in some rows or columns, one, or all."""
    rows = rng.randint(1, 4)
    columns = rng.randint(1, 4)
    mask = torch.rand(rows, columns) < rng.choice([0.2, 0.5, 0.8])
    kind = rng.choice(["random", "empty row", "empty column", "single", "full", "none", "diagonal"])
    if kind == "empty row":
        mask[rng.randrange(rows)] = False
    if kind == "empty column":
        mask[:, rng.randrange(columns)] = False
    if kind in ("single", "none", "full"):
        mask[:] = kind == "full"
    if kind == "single":
        mask[rng.randrange(rows), rng.randrange(columns)] = True
    if kind == "diagonal":
        mask = torch.eye(max(rows, columns), dtype=torch.bool)
    return mask


def with_tail(topology: block_sparse.Topology, extra: int) -> block_sparse.Topology:
    """Return the topology with room for more blocks."""
    rows = torch.cat([topology.row_indices, torch.full((extra,), topology.rows, device=DEVICE)])
    columns = torch.cat([topology.column_indices, torch.zeros(extra, device=DEVICE)])
    return block_sparse.topology_of_indices(
        rows.int(), columns.int(), topology.rows, topology.columns, topology.block
    )


def chain(leaves: dict[str, torch.Tensor], topology, transposed: bool, outputs: dict):
    """Return blocks, products and gradients of left @ right, its product with `x`, and `y` with it.

    `outputs` holds the gradient of each result; missing ones are drawn.
    """
    sparse = sdd(leaves["left"], leaves["right"], topology)
    sparse = BlockSparse(sparse.data + leaves["data"], topology, transposed)
    results = {"data": sparse.data, "dsd": sparse @ leaves["x"], "dds": leaves["y"] @ sparse}
    for name, result in results.items():
        if name not in outputs:
            outputs[name] = torch.randn(result.shape, device=DEVICE, dtype=torch.float64)
    outputs["data"] = outputs["data"] * topology.live()[:, None, None]
    gradients = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [outputs[name].to(result.dtype) for name, result in results.items()],
    )
    return {**results, **{f"d {name}": g for name, g in zip(leaves, gradients)}}


def dense_chain(leaves, topology, transposed, outputs):
    """Compute the same with dense matrices and a mask."""
    ones = torch.ones_like(leaves["data"]) * topology.live()[:, None, None]
    mask = reference.to_dense(ones, topology)
    dense = (leaves["left"] @ leaves["right"]) * mask
    dense = dense + reference.to_dense(leaves["data"], topology)
    data = reference.from_dense(dense, topology)
    dense = dense.mT if transposed else dense
    results = {"data": data, "dsd": dense @ leaves["x"], "dds": leaves["y"] @ dense}
    gradients = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [outputs[name].to(result.dtype) for name, result in results.items()],
    )
    return {**results, **{f"d {name}": g for name, g in zip(leaves, gradients)}}


def strided(rng: random.Random, *size: int) -> torch.Tensor:
    """Return a random float64 matrix, stored row by row or column by column."""
    if rng.random() < 0.5:
        return torch.randn(*size[:-2], size[-1], size[-2], device=DEVICE, dtype=torch.float64).mT
    return torch.randn(size, device=DEVICE, dtype=torch.float64)


def leaves_of(
    rng: random.Random, topology, transposed: bool, sizes=(16, 48, 64, 100)
) -> dict[str, torch.Tensor]:
    rows, columns = topology.shape
    depth, width, height = (rng.choice(sizes) for _ in range(3))
    tail = topology.live()[:, None, None]
    data = torch.randn(topology.blocks, topology.block, topology.block, device=DEVICE)
    inner = rows if transposed else columns
    outer = columns if transposed else rows
    return {
        "left": strided(rng, rows, depth) * depth**-0.5,
        "right": strided(rng, depth, columns),
        "data": data.double() * tail,
        "x": strided(rng, inner, width) * inner**-0.5,
        "y": strided(rng, height, outer) * outer**-0.5,
    }


def cast(leaves, dtype):
    return {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}


def check(rng: random.Random, topology, transposed: bool, dtype: torch.dtype, *sizes: int) -> None:
    leaves = leaves_of(rng, topology, transposed, *([sizes] if sizes else []))
    outputs = {}
    got = chain(cast(leaves, dtype), topology, transposed, outputs)
    plain = dense_chain(cast(leaves, dtype), topology, transposed, outputs)
    exact = dense_chain(cast(leaves, torch.float64), topology, transposed, outputs)
    for name, want in exact.items():
        assert got[name].shape == want.shape
        assert relative_error(got[name], want) <= allowed_error(plain[name], want), name


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("part", PARTS)
def test_matches_dense_float64_on_random_topologies(block, part):
    """Values and all gradients in three dtypes. All parts together are `TOPOLOGIES` topologies."""
    rng = random.Random(1000 * block + part)
    for case in range(TOPOLOGIES // 10):
        topology = block_sparse.topology_of_mask(random_mask(rng).to(DEVICE), block)
        if rng.random() < 0.5:
            topology = with_tail(topology, rng.randint(1, 5))
        check(rng, topology, rng.random() < 0.5, DTYPES[case % 3])


@pytest.mark.parametrize("part", PARTS)
def test_gluon_matches_dense_float64_on_random_topologies(part, monkeypatch):
    """The kernels for Hopper GPUs, on a CPU in the tests' own interpreter."""
    if DEVICE == "cpu":
        gluon_interpreter.install(monkeypatch)
        monkeypatch.setattr(_ops, "runs_gluon", lambda device: True)
    elif not _ops.runs_gluon(torch.device("cuda", 0)):
        pytest.skip("no Hopper GPU")
    launches = []
    write = _ops._gluon().launch
    monkeypatch.setattr(_ops._gluon(), "launch", lambda *a: launches.append(a) or write(*a))
    rng = random.Random(part)
    for case in range(CASES):
        topology = block_sparse.topology_of_mask(random_mask(rng).to(DEVICE), 128)
        if rng.random() < 0.5:
            topology = with_tail(topology, rng.randint(1, 5))
        check(rng, topology, rng.random() < 0.5, DTYPES[1 + case % 2], 136, 256, 328)
    assert len(launches) > 6 * CASES / 2


@pytest.mark.parametrize(
    ("block", "tiling"),
    [
        (64, Tiling(64, 64, 16, 8, 1)),
        (64, Tiling(64, 128, 32, 4, 1)),
        (128, Tiling(64, 64, 64, 8, 1)),
        (128, Tiling(128, 128, 32, 8, 1)),
    ],
)
def test_every_tile_gives_the_same(block, tiling, monkeypatch):
    """Tiles smaller than a block, as large, and over several blocks of one or of two rows."""
    monkeypatch.setattr(_ops, "sparse_output_tiling", lambda *_: tiling)
    monkeypatch.setattr(_ops, "dense_output_tiling", lambda *_: tiling)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    topology = block_sparse.topology_of_mask(mask.to(DEVICE), block)
    check(random.Random(1), topology, False, torch.float32)


def grouped_results(matmuls, up, down, x, topology):
    """Return x @ up and its product with down, up and down in groups, and their gradients."""
    z = matmuls.sdd(x, up.mT, topology)
    y = matmuls.dsd(z, down.mT)
    return [y, *torch.autograd.grad(y, [x, up, down], torch.ones_like(y))]


def test_dense_operands_may_be_groups_of_matrices():
    """As packed expert weights up [E, F, D] and down [E, D, F] are."""
    block = 64
    groups = 2
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    topology = block_sparse.topology_of_mask(mask.to(DEVICE), block)
    torch.manual_seed(4)
    x = torch.randn(3 * block, 24, device=DEVICE, requires_grad=True)
    up = torch.randn(groups, 2 * block, 24, device=DEVICE, requires_grad=True)
    down = torch.randn(groups, 24, 2 * block, device=DEVICE, requires_grad=True)
    got = grouped_results(block_sparse, up, down, x, topology)
    flat = (sdd(x, up.flatten(0, 1).mT, topology) @ down.mT.flatten(0, 1)).sum()
    want = [flat, *torch.autograd.grad(flat, [x, up, down])]
    assert relative_error(got[0].sum(), want[0]) < 1e-5
    for gradient, expected, leaf in zip(got[1:], want[1:], (x, up, down)):
        assert relative_error(gradient, expected) < 1e-5
        assert gradient.stride() == leaf.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_reference_computes_the_same(dtype):
    """Also on a CPU without the interpreter, and in float64."""
    topology = block_sparse.topology_of_mask(torch.rand(3, 4, device=DEVICE) < 0.5, 64)
    x, y = (torch.randn(size, device=DEVICE) for size in ((192, 40), (40, 256)))
    x, y = x.to(dtype), y.to(dtype)
    want = (x.double() @ y.double()) * reference.to_dense(
        torch.ones(topology.blocks, 64, 64, device=DEVICE), topology
    )
    data = reference.sdd(x, y, topology)
    assert relative_error(reference.to_dense(data, topology), want) < 0.005
    got = reference.dsd(data, topology, y.mT)
    assert relative_error(got, want @ y.double().mT) < 0.01
    got = reference.dsd(data, topology, x, transposed=True)
    assert relative_error(got, want.mT @ x.double()) < 0.01


def test_dense_and_back():
    torch.manual_seed(2)
    dense = torch.randn(192, 256, device=DEVICE)
    dense[64:128] = 0
    dense[:, 64:128] = 0
    sparse = block_sparse.from_nonzero(dense, 64)
    assert sparse.topology.blocks == 2 * 3
    assert torch.equal(sparse.to_dense(), dense)
    assert torch.equal(sparse.T.to_dense(), dense.mT)
    full = block_sparse.topology_of_mask(torch.ones(3, 4, device=DEVICE), 64)
    assert torch.equal(block_sparse.from_dense(dense, full).to_dense(), dense)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", [[1, 0, 3], [0, 0, 0], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("widths", [[2, 2, 2], [1, 3, 2]], ids=str)
def test_topology_of_experts(widths, counts, gated):
    """Each expert has its rows and the first `width` of its 3 columns, of gate and of up."""
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    stored = torch.tensor(widths, device=DEVICE)
    topology = block_sparse.topology_of_experts(offsets, 7, stored, 3, 64, gated)
    parts = 2 if gated else 1
    mask = torch.zeros(7, 3, parts, 3, dtype=torch.bool)
    for expert, width in enumerate(widths):
        mask[offsets[expert] : offsets[expert + 1], expert, :, :width] = True
    want = block_sparse.topology_of_mask(mask.flatten(1).to(DEVICE), 64)
    live = int(topology.offsets[-1])
    assert topology.blocks == 7 * parts * 3
    assert torch.equal(topology.offsets, want.offsets)
    assert torch.equal(topology.column_offsets, want.column_offsets)
    position = topology.row_indices * topology.columns + topology.column_indices
    of_mask = want.row_indices * want.columns + want.column_indices
    assert torch.equal(position[:live].sort().values, of_mask)
    assert (topology.row_indices[live:] == 7).all()
    if gated:  # gate and up of the same columns are neighbours
        gate, up = topology.column_indices[:live].view(-1, 2).unbind(1)
        assert torch.equal(gate + 3, up)


def test_operators_pass_opcheck():
    topology = block_sparse.topology_of_mask(torch.eye(2, device=DEVICE), 64)
    leaves = cast(leaves_of(random.Random(3), topology, True), torch.float32)
    with CustomOps() as ops:
        chain(leaves, topology, True, {})
    assert {op.name() for op, *_ in ops.calls} == {"tokenyard_sparse::sdd", "tokenyard_sparse::dsd"}
    for op, args, kwargs, differentiable in ops.calls:
        torch.library.opcheck(op, tuple(fresh(a, differentiable) for a in args), kwargs)


def test_compiles_whole():
    def step(x, w, mask):
        topology = block_sparse.topology_of_indices(mask[0], mask[1], 2, 2, 64)
        return dsd(sdd(x, w, topology), w.mT)

    torch.manual_seed(3)
    x = torch.randn(128, 16, device=DEVICE)
    w = torch.randn(16, 128, device=DEVICE)
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, mask), step(x, w, mask))


def test_second_derivatives():
    """A gradient is a block-sparse matmul again."""
    topology = block_sparse.topology_of_mask(torch.eye(1, device=DEVICE), 64)
    torch.manual_seed(3)
    x = torch.randn(64, 8, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad((sdd(x, x.mT, topology) @ x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    dense = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad((dense @ dense.mT @ dense).sum(), dense, create_graph=True)
    (want,) = torch.autograd.grad(gradient.square().sum(), dense)
    assert relative_error(second, want) < 1e-4


def test_results_repeat_bit_by_bit():
    topology = block_sparse.topology_of_mask(torch.ones(2, 2, device=DEVICE), 64)
    leaves = leaves_of(random.Random(3), topology, False)
    outputs = {}
    first, second = (chain(cast(leaves, torch.bfloat16), topology, False, outputs) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_multiplied_is_one_sentence():
    topology = block_sparse.topology_of_mask(torch.ones(2, 3, device=DEVICE), 64)
    x = torch.zeros(128, 8, device=DEVICE)
    with pytest.raises(ConfigError, match=r"left is \[128, 8\] and right \[8, 128\], but the topo"):
        sdd(x, x.mT, topology)
    sparse = BlockSparse(torch.zeros(6, 64, 64, device=DEVICE), topology)
    with pytest.raises(ConfigError, match=r"sparse matrix is \[128, 192\] and the dense one \[128"):
        dsd(sparse, x)
    with pytest.raises(ConfigError, match=r"float32 and the other .*bfloat16; cast one"):
        dds(x.mT.bfloat16(), sparse)
    with pytest.raises(
        ConfigError, match="a group of an operand is 96 wide; it must be a multiple"
    ):
        dsd(sparse, torch.zeros(2, 96, 8, device=DEVICE))
    with pytest.raises(ConfigError, match=r"data is \[5, 64, 64\], but the topology stores"):
        BlockSparse(torch.zeros(5, 64, 64), topology)
    with pytest.raises(
        ConfigError, match="block is 32; block-sparse matrices have blocks of 64, 128"
    ):
        block_sparse.topology_of_mask(torch.ones(2, 2), 32)
    with pytest.raises(ConfigError, match="M is 100, which is not a multiple of the block, 64"):
        block_sparse.from_nonzero(torch.zeros(100, 64), 64)
