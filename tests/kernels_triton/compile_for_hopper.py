"""Compile the kernels of an expert layer for sm_90 without a GPU; print a JSON record per kernel.

Run it as a program, without Triton's interpreter. The package launches its kernels on CPU tensors
of undefined contents. Each launch compiles the kernel instead, and the record holds what its binary
says about registers, spills and wgmma instructions.
"""

import contextlib
import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from struct import Struct

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tokenyard import LoraAdapter, LoraSettings, RoutingRule, Workload
from tokenyard.activations import swiglu, up_rows
from tokenyard.interfaces import ExpertWeights, GradientSums, LowRank, Plan
from tokenyard_kernels_triton import driver_launch, tensor_map
from tokenyard_kernels_triton.launching import Launch
from tokenyard_kernels_triton.replay import _entries

TARGET = GPUTarget("cuda", 90, 32)
SHAPES = {  # T, D, F, E, K
    "widest": (2100, 2048, 4096, 8, 2),
    "widest on an H100": (512, 2048, 4096, 8, 2),
    "wide": (512, 2048, 1536, 8, 2),
    "narrow": (512, 2048, 768, 8, 2),
    "odd": (100, 60, 36, 6, 2),
    "more tokens": (513, 2048, 768, 8, 2),
    "few tokens": (24, 2048, 768, 8, 2),
    "twice as many": (64, 2048, 768, 8, 2),
    "four times as many": (128, 2048, 768, 8, 2),
    "two tokens": (2, 2048, 768, 8, 2),
    "one token": (1, 2048, 768, 8, 2),
}


class HopperDriver:
    """The part of a Triton driver that compiling uses."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(compiled):
    """Compile every launched kernel instead of running it; append (name, kernel) to `compiled`."""
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(kernel, "asm"):  # else it is compiled in another thread
            kernel.passed = passed(self, kernel, args, kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(HopperDriver())
    _entries.clear()  # nothing recorded can be repeated without a GPU
    JITFunction.run = warm_up
    try:
        yield
    finally:
        JITFunction.run = run


def passed(function, kernel, args, kwargs):
    """Return the bytes of each argument in a repeated launch; None if that is left to Triton."""
    *_, binder = function.device_caches[0]
    bound, *_ = binder(*args, **kwargs, debug=function.debug)
    arguments = list(bound.values())
    tensors = {
        position: (0, 0)
        for position, argument in enumerate(arguments)
        if isinstance(getattr(argument, "base", argument), torch.Tensor)
    }
    repeated = driver_launch.driver_launch(Launch(None, (1, 1, 1), arguments, {}, kernel), tensors)
    if repeated is None:
        return None
    codes = re.findall(r"(128s|[a-zA-Z])\d+x|(128s)0x", repeated.layout.format)
    return [Struct("@" + "".join(code)).size for code in codes]


def parameter_sizes(cubin):
    """Return the bytes of each parameter of a cubin's kernel.

    The section .nv.info.KERNEL of the ELF file has them, in records of a format (4: bytes follow),
    an attribute (0x17: EIATTR_KPARAM_INFO) and the number of bytes.
    """
    (start,) = Struct("<Q").unpack_from(cubin, 40)
    width, count, names = Struct("<HHH").unpack_from(cubin, 58)
    sections = [Struct("<IIQQQQ").unpack_from(cubin, start + width * i) for i in range(count)]
    name_bytes = cubin[sections[names][4] :]
    sizes = {}
    for name, *_, offset, length in sections:
        if not name_bytes[name:].startswith(b".nv.info."):
            continue
        end = offset + length
        while offset < end:
            kind, attribute, more = Struct("<BBH").unpack_from(cubin, offset)
            if (kind, attribute) == (4, 0x17):
                _, ordinal, _, packed = Struct("<IHHI").unpack_from(cubin, offset + 4)
                sizes[ordinal] = packed >> 18
            offset += 4 + (more if kind == 4 else 0)
    return [sizes[ordinal] for ordinal in range(len(sizes))]


def usage(kernel):
    """Return the registers, spilled bytes, shared memory and matrix instructions of a kernel.

    Also the bytes of each parameter that its binary has, and of each argument of a repeated launch.
    """
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(counts["REG"]),
        "spilled": int(counts["STACK"]) + int(counts["LOCAL"]),
        "shared": kernel.metadata.shared,
        "parameters": parameter_sizes(kernel.asm["cubin"]),
        "passed": kernel.passed,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m\d+n\d+k\d+)", ptx))),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tma": "cp.async.bulk.tensor" in ptx,
        "gathers": bool(re.search(r"cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
    }


def layer(kernels, shape, dtype, activation, bias, save, **options):
    """Run one forward and backward pass of a layer."""
    from tokenyard_kernels_triton import experts as backends
    from tokenyard_kernels_triton.permutation import TritonPermutation
    from tokenyard_kernels_triton.router import TritonRouter

    tokens, dim, ffn_dim, experts, top_k = shape
    rule = RoutingRule(
        score="sigmoid", normalize=1.0, bias_update_rate=0.01, num_groups=2, groups_kept=1
    )
    workload = Workload(
        dim, ffn_dim, experts, top_k, activation, bias=bias, dtype=dtype, router=rule
    )
    kernel = getattr(backends, kernels)(workload, None, save=save, **options)
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    plan = TritonPermutation(workload).plan(ids, experts)
    rows = up_rows(activation, ffn_dim)

    def leaf(*size, dtype=dtype):
        return torch.zeros(size, dtype=dtype, requires_grad=True)

    biases = (leaf(experts, rows), leaf(experts, dim)) if bias else (None, None)
    weights = ExpertWeights(leaf(experts, rows, dim), leaf(experts, dim, ffn_dim), *biases)
    x = leaf(tokens, dim)
    router = TritonRouter(workload).to(dtype)
    y = kernel(x, Plan(*plan), router(x).topk_weights, weights)
    y.backward(torch.zeros_like(y))
    move(TritonPermutation(workload), x, Plan(*plan), router(x).topk_weights)


def adapted(kernels, shape, dtype, activation, rank, dropout):
    """Run one forward and backward pass of experts with adapters on a frozen base."""
    from tokenyard_kernels_triton import experts as backends
    from tokenyard_kernels_triton.permutation import TritonPermutation

    tokens, dim, ffn_dim, experts, top_k = shape
    workload = Workload(dim, ffn_dim, experts, top_k, activation, dtype=dtype)
    rows = up_rows(activation, ffn_dim)
    x, up, down, up_a, up_b, down_a, down_b, mask = (
        torch.zeros(size, dtype=dtype)
        for size in (
            (tokens, dim),
            (experts, rows, dim),
            (experts, dim, ffn_dim),
            (experts, rank, dim),
            (experts, rows, rank),
            (experts, rank, ffn_dim),
            (experts, dim, rank),
            (tokens * top_k, ffn_dim),
        )
    )
    leaves = [x, up_a, up_b, down_a, down_b]
    for leaf in leaves:
        leaf.requires_grad_()
    plan = TritonPermutation(workload).plan(torch.zeros(tokens, top_k, dtype=torch.int32), experts)
    weights = torch.zeros(tokens, top_k, requires_grad=True)
    after = (x * 2, mask.bool()) if dropout else (None, None)
    low_rank = LowRank(*leaves[1:], *after, up_scale=2.0, down_scale=3.0)
    kernel = getattr(backends, kernels)(workload, None, save="recompute")
    y = kernel.with_adapter(x, plan, weights, ExpertWeights(up, down), low_rank)
    y.backward(torch.zeros_like(y))


def summed(kernels, shape, dtype):
    """Run one forward and backward pass of experts that add the gradients of weights to sums."""
    from tokenyard_kernels_triton import experts as backends
    from tokenyard_kernels_triton.permutation import TritonPermutation

    tokens, dim, ffn_dim, experts, top_k = shape
    workload = Workload(dim, ffn_dim, experts, top_k, dtype=dtype)
    x, up, down = (
        torch.zeros(size, dtype=dtype, requires_grad=True)
        for size in ((tokens, dim), (experts, 2 * ffn_dim, dim), (experts, dim, ffn_dim))
    )
    plan = TritonPermutation(workload).plan(torch.zeros(tokens, top_k, dtype=torch.int32), experts)
    topk_weights = torch.zeros(tokens, top_k, requires_grad=True)
    sums = GradientSums(torch.zeros(up.shape), torch.zeros(down.shape))
    kernel = getattr(backends, kernels)(workload, None)
    y = kernel.with_sums(x, Plan(*plan), topk_weights, ExpertWeights(up, down), sums)
    y.backward(torch.zeros_like(y))


def muon(dtype):
    """Run the passes of Muon over a stack of matrices whose gradient is in `dtype`."""
    from tokenyard_kernels_triton.ops._symmetric import symmetric_product
    from tokenyard_kernels_triton.optimizer import muon as passes

    one = torch.ones(())
    momentum = torch.zeros(4, 512, 256)
    update = passes.nesterov(momentum.to(dtype), momentum, one, 0.95)
    x = update.half()
    passes.scale_matrices(update, x, 8.0, torch.ones(4))
    gram = x.new_empty(4, 256, 256)
    symmetric_product(x.mT, x.mT, gram)
    for addend in (None, gram):
        symmetric_product(gram, gram, gram.clone(), 2.0, addend, 3.0, 4.0)
    passes.scale_matrices(x, update, 0.1)
    for weight in (momentum, update):
        passes.descend(momentum, weight, update, one, one)


def move(permutation, x, plan, weights):
    """Permute and unpermute without experts, as an exchange does, and run both backward passes."""
    y = permutation.unpermute(permutation.permute(x, plan), plan, weights)
    y.backward(torch.zeros_like(y))


def pack(shape, dtype):
    """Pack rows in FP8 and unpack them, as an exchange does."""
    from tokenyard_kernels_triton.ops._packed_rows import pack_rows, unpack_rows

    unpack_rows(pack_rows(torch.zeros(shape[:2], dtype=dtype)), dtype)


def block_sparse(block, dtype, depth, gluon):
    """Run the forward and backward pass of an up and a down matmul over a full topology."""
    from tokenyard_kernels_triton.block_sparse import _ops, dsd, sdd, topology_of_mask

    _ops._by_kernels = lambda tensor: True
    _ops.runs_gluon = lambda device: gluon
    topology = topology_of_mask(torch.ones(4, 1024 // block), block)
    x, up, down = (
        torch.zeros(size, dtype=dtype, requires_grad=True)
        for size in ((4 * block, depth), (2, 512, depth), (2, depth, 512))
    )
    y = dsd(sdd(x, up.mT, topology), down.mT)
    y.backward(torch.zeros_like(y))


BLOCK_SPARSE = (
    (64, torch.bfloat16, 512, False),
    (64, torch.float16, 500, False),
    (128, torch.bfloat16, 512, False),
    (128, torch.bfloat16, 500, False),
    (128, torch.float16, 512, False),
    (128, torch.float32, 512, False),
    (128, torch.float32, 500, False),
    (128, torch.bfloat16, 512, True),
    (128, torch.float16, 512, True),
)


def not_prepared():
    """Return the names of kernels that a layer launches and `prepare` does not compile."""
    from tokenyard_kernels_triton.experts import GluonExperts
    from tokenyard_kernels_triton.permutation import TritonPermutation
    from tokenyard_kernels_triton.router import TritonRouter

    tokens, dim, ffn_dim, experts, top_k = SHAPES["narrow"]
    rule = RoutingRule(
        score="sigmoid", normalize=1.0, bias_update_rate=0.01, num_groups=2, groups_kept=1
    )
    workload = Workload(dim, ffn_dim, experts, top_k, dtype=torch.bfloat16, router=rule)
    weights = {"up": torch.empty(1, 1, 1), "down": torch.empty(1, 1, 1)}
    adapter = LoraAdapter(weights, {}, LoraSettings(16, 16.0, dropout=0.1))

    def prepare(kernel, adapter=None, sums=False):
        for part in (TritonRouter(workload).bfloat16(), TritonPermutation(workload)):
            part.prepare(tokens)
        if sums:
            kernel.prepare_with_sums(tokens)
        elif adapter is None:
            kernel.prepare(tokens)
        else:
            kernel.prepare_with_adapter(tokens, adapter)

    arguments = ("GluonExperts", SHAPES["narrow"], torch.bfloat16, "swiglu")
    in_fp8 = {"precision": "fp8", "weight_gradients": "fp8"}
    return sorted(
        missing(
            lambda: prepare(GluonExperts(workload, None)),
            lambda: layer(*arguments, False, "pre_activation"),
        )
        | missing(
            lambda: prepare(GluonExperts(workload, None, save="recompute"), adapter),
            lambda: adapted(*arguments, 16, True),
        )
        | missing(
            lambda: prepare(GluonExperts(workload, None), sums=True),
            lambda: summed(*arguments[:3]),
        )
        | missing(
            lambda: prepare(GluonExperts(workload, None, **in_fp8)),
            lambda: layer(*arguments, False, "fp8", **in_fp8),
        )
    )


def missing(prepare, launch):
    """Return the names of kernels that a call launches and another one does not compile."""
    ahead = []
    launched = []
    with compiling(ahead):
        prepare()
    with compiling(launched):
        launch()
    hashes = {
        (kernel.result() if hasattr(kernel, "result") else kernel).hash for _, kernel in ahead
    }
    return {name for name, kernel in launched if kernel.hash not in hashes}


CASES = (
    ("GluonExperts", "wide", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "widest", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "widest on an H100", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "narrow", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "narrow", torch.float16, "gelu_tanh", True, "recompute"),
    ("GluonExperts", "wide", torch.float16, "gelu_tanh", False, "pre_activation"),
    ("GluonExperts", "narrow", torch.bfloat16, "gelu", False, "pre_activation"),
    ("GluonExperts", "narrow", torch.bfloat16, "swiglu", True, "recompute"),
    ("GluonExperts", "wide", torch.bfloat16, "geglu", True, "fp8"),
    ("GluonExperts", "wide", torch.bfloat16, swiglu(limit=7), False, "pre_activation"),
    ("GluonExperts", "narrow", torch.bfloat16, swiglu(1.702, 7, 1), False, "pre_activation"),
    ("TritonExperts", "wide", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("TritonExperts", "odd", torch.bfloat16, "geglu", True, "fp8"),
    ("TritonExperts", "wide", torch.float32, "swiglu", False, "pre_activation"),
    ("GluonExperts", "few tokens", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "twice as many", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "four times as many", torch.float16, "gelu_tanh", True, "recompute"),
    ("GluonExperts", "four times as many", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("TritonExperts", "two tokens", torch.bfloat16, "swiglu", False, "pre_activation"),
    # The last two compile nothing new.
    ("GluonExperts", "more tokens", torch.bfloat16, "swiglu", False, "pre_activation"),
    ("GluonExperts", "one token", torch.bfloat16, "swiglu", False, "pre_activation"),
)

IN_FP8 = (  # the last field is the option `weight_gradients`
    ("narrow", torch.bfloat16, "swiglu", False, "fp8", "fp8"),
    ("wide", torch.bfloat16, "swiglu", False, "fp8", None),
    ("wide", torch.bfloat16, swiglu(1.702, 7, 1), True, "pre_activation", None),
    ("narrow", torch.float16, "gelu_tanh", True, "recompute", None),
)

ADAPTED = (
    ("GluonExperts", "narrow", torch.bfloat16, "swiglu", 16, False),
    ("GluonExperts", "narrow", torch.float16, "gelu", 128, False),
    ("TritonExperts", "narrow", torch.bfloat16, "swiglu", 64, True),
    ("TritonExperts", "odd", torch.bfloat16, "swiglu", 4, False),
    ("TritonExperts", "narrow", torch.float32, "swiglu", 16, True),
)


def report(kernels, case, dtype, compiled, seen):
    """Print the records of kernels that were not seen before."""
    case = {"kernels": kernels, "case": case, "dtype": dtype, "activation": "none"}
    for name, kernel in compiled:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(json.dumps(case | {"kernel": name} | usage(kernel)), flush=True)


def main():
    import tokenyard_kernels_triton._device as device
    import tokenyard_kernels_triton.block_sparse._gluon as sparse_gluon
    import tokenyard_kernels_triton.gluon_tiling as tiling
    import tokenyard_kernels_triton.ops._few_rows as few_rows
    import tokenyard_kernels_triton.ops._gluon as gluon
    import tokenyard_kernels_triton.ops._gluon_fp8 as gluon_fp8
    import tokenyard_kernels_triton.ops._moves as moves
    import tokenyard_kernels_triton.ops._portable as portable
    import tokenyard_kernels_triton.ops._symmetric as symmetric

    for module in (device, gluon, gluon_fp8, portable, sparse_gluon, symmetric):
        module.processors = functools.cache(lambda device: 132)
    for module in (few_rows, moves):
        module.chained = lambda device: {"CHAINED": True, "launch_pdl": True}
    driver_launch.has_driver = lambda: True
    tensor_map._encode_function = lambda: True  # never called, as nothing is launched
    seen = set()
    gpu_key = tiling.gpu_key
    for kernels, name, dtype, activation, bias, save in CASES:
        compiled = []
        tiling.gpu_key = (lambda _: "NVIDIA H100") if name.endswith("H100") else gpu_key
        with compiling(compiled):
            layer(kernels, SHAPES[name], dtype, activation, bias, save)
        case = {
            "kernels": kernels,
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "activation": activation,
        }
        for kernel_name, kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps(case | {"kernel": kernel_name} | usage(kernel)), flush=True)
    for name, dtype, activation, bias, save, weight_gradients in IN_FP8:
        compiled = []
        options = {"precision": "fp8", "weight_gradients": weight_gradients}
        with compiling(compiled):
            layer("GluonExperts", SHAPES[name], dtype, activation, bias, save, **options)
            pack(SHAPES[name], dtype)
        case = {
            "kernels": "GluonExperts in FP8",
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "activation": activation,
        }
        for kernel_name, kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps(case | {"kernel": kernel_name} | usage(kernel)), flush=True)
    for kernels, name, dtype, activation, rank, dropout in ADAPTED:
        compiled = []
        with compiling(compiled):
            adapted(kernels, SHAPES[name], dtype, activation, rank, dropout)
        case = {
            "kernels": f"adapters of {kernels}",
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "activation": activation,
        }
        for kernel_name, kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps(case | {"kernel": kernel_name} | usage(kernel)), flush=True)
    for kernels in ("GluonExperts", "TritonExperts"):
        compiled = []
        with compiling(compiled):
            summed(kernels, SHAPES["narrow"], torch.bfloat16)
        report(f"sums of {kernels}", "narrow", "bfloat16", compiled, seen)
    for dtype in (torch.bfloat16, torch.float32):
        compiled = []
        with compiling(compiled):
            muon(dtype)
        report("muon", "stack", str(dtype).removeprefix("torch."), compiled, seen)
    for block, dtype, depth, in_gluon in BLOCK_SPARSE:
        compiled = []
        with compiling(compiled):
            block_sparse(block, dtype, depth, in_gluon)
        case = {
            "kernels": "block_sparse in Gluon" if in_gluon else "block_sparse",
            "case": "odd" if depth % 8 else f"blocks of {block}",
            "dtype": str(dtype).removeprefix("torch."),
            "activation": "none",
        }
        for kernel_name, kernel in compiled:
            print(json.dumps(case | {"kernel": kernel_name} | usage(kernel)), flush=True)
    tiling.gpu_key = gpu_key
    ahead = not_prepared()
    print(json.dumps({"not prepared": ahead}), flush=True)


if __name__ == "__main__":
    main()
