"""Which setting of torch lets matmuls of float32 round to TF32."""

import pytest
import torch

from tokenyard import MoE, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def matmul():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_each_setting_of_torch_is_read(matmul):
    from tokenyard_kernels_triton._device import may_round_float32

    before = torch.get_float32_matmul_precision()
    for precision, rounds in (("high", True), ("highest", False), ("medium", True)):
        torch.set_float32_matmul_precision(precision)
        assert may_round_float32() == rounds
    torch.set_float32_matmul_precision(before)
    for precision, rounds in (("tf32", True), ("ieee", False)):
        matmul.fp32_precision = precision
        assert may_round_float32() == rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_after_the_newer_setting(matmul, dtype):
    """After it, ``torch.get_float32_matmul_precision`` raises an error."""
    workload = Workload(32, 64, 4, 2, dtype=dtype, device=DEVICE)
    moe = MoE(workload, backends={"experts": "triton"}, dtype=dtype)
    matmul.fp32_precision = "tf32"
    y, _ = moe(torch.randn(5, 32, dtype=dtype, device=DEVICE))
    assert y.isfinite().all()
