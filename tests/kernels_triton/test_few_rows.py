"""The matmuls for few rows an expert equal the portable ones: in the interpreter, on a GPU too."""

import pytest
import torch

from tokenyard import Workload
from tokenyard.interfaces import Plan
from tokenyard.tolerance import relative_error
from tokenyard_kernels_triton.ops import _few_rows, _kernel_set, _portable
from tokenyard_kernels_triton.ops._moves import to_rows
from tokenyard_kernels_triton.ops._row_tiles import RowTiles
from tokenyard_kernels_triton.permutation import TritonPermutation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, TOP_K = 5, 2


@pytest.mark.parametrize(("dim", "ffn_dim"), [(136, 72), (60, 36)])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("tokens", [1, 47])
def test_matmuls_equal_the_portable_ones(tokens, activation, dim, ffn_dim):
    """With biases, dropped slots, an expert without rows and one of several tiles."""
    torch.manual_seed(tokens)
    workload = Workload(dim, ffn_dim, EXPERTS, TOP_K, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.randint(0, EXPERTS + 1, (tokens, TOP_K), dtype=torch.int32, device=DEVICE)
    ids[ids == 1] = 2
    ids[0, 0] = 0
    plan = TritonPermutation(workload).plan(ids, EXPERTS)
    row_tiles = RowTiles(plan.offsets, tokens * TOP_K)
    live = int(plan.offsets[-1])
    parts = 2 if activation == "swiglu" else 1

    def draw(*size):
        return torch.randn(size, device=DEVICE).bfloat16()

    x = draw(tokens, dim)
    z = draw(ids.numel(), parts * ffn_dim)
    a = draw(ids.numel(), ffn_dim)
    up = draw(EXPERTS, parts * ffn_dim, dim)
    up_bias = draw(EXPERTS, parts * ffn_dim)
    down = draw(EXPERTS, dim, ffn_dim)
    down_bias = draw(EXPERTS, dim)

    def results(matmuls, rows):
        over_rows = (
            *matmuls.up_and_activate(rows, up, up_bias, row_tiles, activation),
            matmuls.times_weight(a, down, down_bias, row_tiles, True, "down"),
            matmuls.times_weight(rows, down, None, row_tiles, False, "activation_gradient"),
            matmuls.times_weight(z, up, None, row_tiles, False, "input_gradient"),
        )
        return (
            *(result[:live] for result in over_rows),
            matmuls.weight_gradient(z, rows, row_tiles, "up_gradient"),
            matmuls.weight_gradient(rows, a, row_tiles, "down_gradient"),
        )

    weights = torch.rand(tokens, TOP_K, device=DEVICE)

    def differentiated(matmuls, rows):
        dz = z.clone()  # in the place of z, as when no later backward pass reads that
        operands = (rows, down, dz, dz, plan.order, weights, row_tiles, activation)
        weighted, dots = matmuls.differentiate_down(*operands)
        return dz[:live], weighted[:live], dots[:live].sum(1)

    gathered = _few_rows.rows_of(x, plan, ffn_dim)
    *matrices, dots = differentiated(_few_rows, gathered)
    *expected_matrices, expected_dots = differentiated(_portable, to_rows(x, plan))
    for result, expected in zip(matrices, expected_matrices):
        assert relative_error(result, expected) < 5e-3  # the portable kernel rounds da
    size = (dim * ffn_dim * live) ** 0.5  # of sums that do not cancel
    assert (dots - expected_dots).norm() < 5e-3 * size

    want = results(_portable, to_rows(x, plan))
    for result, expected in zip(results(_few_rows, gathered), want):
        assert result.shape == expected.shape
        assert relative_error(result, expected) < 3e-3


def test_few_rows_are_a_mean_over_experts():
    def fitting(name, rows, dtype=torch.bfloat16):
        plan = Plan(torch.empty(rows), torch.empty(rows), torch.empty(EXPERTS + 1), TOP_K)
        return _kernel_set.fitting_set(name, plan, dtype)

    limit = EXPERTS * _kernel_set.MOST_FEW_ROWS
    assert fitting("portable", limit) == fitting("gluon", EXPERTS) == "few_rows"
    assert fitting("gluon", limit) == "few_rows_hopper"
    assert fitting("gluon", limit + 1) == "gluon"
    assert fitting("portable", limit, torch.float32) == "portable"
