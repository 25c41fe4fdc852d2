"""The kinds of kernels and operators, and the time of each kind."""

import re
from pathlib import Path

import pytest
import torch

from tokenyard.measure.breakdown import Span, break_down, exclusive_times
from tokenyard.measure.kinds import kind_of

NATIVE = "void at::native::"
NAMES = {
    "matmuls": [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTN",
        "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_execute_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x5_tn_align4>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, float, float, float, true>",
        "triton_tem_fused_mm_3",
        *("up_and_activate", "times_weight", "weight_gradient", "sparse_times_dense"),
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"),
        *("tokenyard::cpu_experts", "tokenyard::cpu_experts_backward", "tokenyard_cuda::logits"),
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "elementwise": [
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)",
        f"{NATIVE}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        f"{NATIVE}(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float)",
        *("triton_poi_fused_add_mul_silu_3", "triton_red_fused_native_layer_norm_2"),
        *("triton_per_fused_mean_rsqrt_1", "triton_poi_fused_embedding_mm_0"),
        *("cross_entropy", "quantize_rows", "quantize_weights", "sum_rows", "pack_row"),
        *("aten::mul", "aten::silu_backward", "aten::native_layer_norm", "aten::sum"),
    ],
    "routing": [
        f"{NATIVE}bitonicSortKVInPlace<-2, -1, 16, 16>",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel",
        *("select_experts", "weigh_experts", "weigh_experts_backward", "place_slots"),
        *("count_blocks", "list_tiles", "route", "route_backward", "count_slots", "plan_at_once"),
        *("aten::sort", "aten::searchsorted", "tokenyard_triton::plan", "tokenyard_cuda::route"),
    ],
    "copies": [
        f"{NATIVE}unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(Iterator&)>",
        f"{NATIVE}vectorized_elementwise_kernel<4, at::native::bfloat16tofloat32_copy_kernel>",
        f"{NATIVE}vectorized_gather_kernel<16, long>(char*, char*, long*)",
        f"{NATIVE}(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, 3, 64>",
        *("Memcpy DtoD (Device -> Device)", "Memcpy HtoD (Pinned -> Device)", "Memset (Device)"),
        *("copy_to_rows", "sum_to_tokens", "weigh_to_rows", "to_rows", "to_tokens_backward"),
        *("aten::copy_", "aten::index_select", "aten::cat", "tokenyard::permute"),
    ],
    "optimizer": [
        f"{NATIVE}(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorList<4>>",
        *("adamw", "aten::_fused_adamw_", "aten::_foreach_norm"),
    ],
    "collectives": [
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        *("c10d::allreduce_", "gloo:all_reduce", "_c10d_functional::all_to_all_single"),
    ],
    "host": [
        *("aten::empty", "aten::as_strided", "aten::transpose", "AddmmBackward0"),
        "autograd::engine::evaluate_function: MmBackward0",
    ],
    "other": ["acme_kernel"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_have_their_kind(kind):
    assert {name: kind_of(name) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)


@pytest.mark.parametrize(
    ("folder", "files", "name", "least"),
    [
        ("kernels-triton/src/tokenyard_kernels_triton", "*.py", r"launch\(_\w+\.(\w+)", 11),
        ("kernels-cuda/src/tokenyard_kernels_cuda", "*.cu", r"__global__ void (\w+)\(", 6),
    ],
    ids=["triton", "cuda"],
)
def test_every_kernel_of_ours_has_a_kind(folder, files, name, least):
    paths = (Path(__file__).parents[3] / "packages" / folder).rglob(files)
    kernels = {k for path in paths for k in re.findall(name, path.read_text(encoding="utf-8"))}
    assert len(kernels) >= least
    assert not [kernel for kernel in kernels if kind_of(kernel) in ("other", "host")]


def test_an_instant_counts_once():
    """Two matmuls overlap, a collective overlaps with both, and nothing runs from 8 to 9."""
    spans = [
        Span("matmuls", 0, 4),
        Span("matmuls", 2, 5),
        Span("collectives", 1, 8),
        Span("copies", 9, 10),
    ]
    assert exclusive_times(spans) == {"matmuls": 5, "collectives": 3, "copies": 1}


def test_a_step_on_a_cpu_has_operators_and_the_rest():
    x = torch.randn(256, 256)
    stages = (lambda _: (x @ x).relu().sort(),)
    kinds, host = break_down(stages, torch.device("cpu"), 2)
    assert list(kinds) == ["matmuls", "elementwise", "routing", "host"] or "copies" in kinds
    assert kinds["host"] == host > 0
    assert kinds["matmuls"] > 0


@pytest.mark.gpu
def test_a_step_on_a_gpu_has_kernels():
    x = torch.randn(2048, 2048, device="cuda")
    (x @ x).relu().clone()
    kinds, host = break_down((lambda _: (x @ x).relu().clone(),), torch.device("cuda"), 3)
    assert list(kinds) == ["matmuls", "elementwise", "copies"]
    assert kinds["matmuls"] > kinds["elementwise"] > 0
    assert host > 0
