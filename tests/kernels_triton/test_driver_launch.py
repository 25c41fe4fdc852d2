"""A recorded launch gives the driver what Triton's launcher would give it; without a GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import triton

from tokenyard.cuda_driver import argument_layout
from tokenyard_kernels_triton import driver_launch, program, tensor_map
from tokenyard_kernels_triton.launching import Launch

PTX = """.visible .entry add(
    .param .u64 .ptr .global .align 1 add_param_0,
    .param .u32 add_param_1,
    .param .u64 .ptr .global .align 1 add_param_2,
    .param .f32 add_param_3,
    .param .u64 .ptr .global .align 1 add_param_4,
    .param .u64 .ptr .global .align 1 add_param_5
)"""
SIGNATURE = {"x": "*bf16", "count": "i32", "y": "*fp32", "SIZE": "constexpr", "scale": "fp32"}


def recorded(signature=SIGNATURE, ptx=PTX, **metadata):
    """Return a launch of a kernel whose arguments are two tensors, a constant and two numbers."""
    plain = {
        "num_ctas": 1,
        "num_warps": 4,
        "shared": 1024,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
        "launch_pdl": True,
    }
    kernel = SimpleNamespace(
        metadata=SimpleNamespace(**plain | metadata),
        src=SimpleNamespace(signature=signature),
        asm={"ptx": ptx},
        function=7,
    )
    return Launch(None, (5, 2, 1), [None, 30, None, 32, 0.5], {}, kernel)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Replace the driver. Return the calls."""
    result = []

    def launch_kernel(function, *arguments):
        result.append((function.value, *arguments))
        return 0 if arguments[1] else 1  # the stream

    monkeypatch.setattr(driver_launch, "launch_kernel", launch_kernel)
    monkeypatch.setattr(driver_launch, "has_driver", lambda: True)
    return result


def test_addresses_are_those_of_the_call(calls):
    launch = driver_launch.driver_launch(recorded(), {0: (1, 6), 2: (0, 0)})
    assert launch.start([4096, 8192], stream=3)
    sizes = (5, 2, 1, 128, 1, 1, 1024)
    assert calls == [(7, sizes, 3, launch.layout, [8198, 30, 4096, 0.5, 0, 0], True)]
    assert launch.layout.format == argument_layout("PiPfPP").format


def test_a_refusal_is_reported():
    """Triton's launcher then launches, and raises the error."""
    assert not driver_launch.driver_launch(recorded(), {}).start([], stream=0)


def test_hooks_are_left_to_triton(monkeypatch, calls):
    """A program that has a launch for the driver starts it by Triton."""
    started = []
    monkeypatch.setattr(program, "start", lambda launch, arguments, stream: started.append(launch))
    builder = program.ProgramBuilder([torch.empty(1)])
    builder.launch(recorded())
    replayed = builder.build([])
    monkeypatch.setattr(program, "current_stream", lambda device: 3)
    replayed.run([torch.empty(1)])
    assert (len(calls), len(started)) == (1, 0)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    replayed.run([torch.empty(1)])
    assert (len(calls), len(started)) == (1, 1)


DESCRIPTOR = SimpleNamespace(shape=[3, 8, 64], strides=[512, 64, 1], padding="zero")
BOX = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 4, 32], "fp4_padded": False}
WITH_DESCRIPTOR = {"count": "i32", "x": "tensordesc<bf16[1, 4, 32]>", "y": "*fp32"}
PTX_OF_DESCRIPTOR = """.visible .entry add(
    .param .u32 add_param_0,
    .param .align 64 .b8 add_param_1[128],
    .param .u32 add_param_2,
    .param .u32 add_param_3,
    .param .u32 add_param_4,
    .param .u64 add_param_5,
    .param .u64 add_param_6,
    .param .u64 add_param_7,
    .param .u64 .ptr .global .align 1 add_param_8,
    .param .u64 .ptr .global .align 1 add_param_9,
    .param .u64 .ptr .global .align 1 add_param_10
)"""


def launch_of_descriptor(ptx=PTX_OF_DESCRIPTOR, box=BOX):
    """Return the launch of a kernel whose arguments are a number, a descriptor and a tensor."""
    launch = recorded(WITH_DESCRIPTOR, ptx, tensordesc_meta=[box])
    launch.arguments[:] = [30, DESCRIPTOR, None]
    return driver_launch.driver_launch(launch, {1: (0, 256), 2: (1, 0)})


@pytest.fixture
def encoded(monkeypatch):
    """Replace the driver's encoding of TMA descriptors. Return the arguments of each call."""
    result = []

    def encode(space, dtype, rank, address, *sizes):
        assert space.value % 64 == 0
        if not address.value:
            return 1
        ctypes.memmove(space.value, bytes([address.value // 1024 % 256] * 128), 128)
        lists = [list(size) if isinstance(size, ctypes.Array) else size for size in sizes]
        result.append((dtype, rank, address.value, *lists))
        return 0

    monkeypatch.setattr(tensor_map, "_encode_function", lambda: encode)
    return result


def test_a_descriptor_is_encoded_once_for_each_address(calls, encoded):
    launch = launch_of_descriptor()
    for first in (768, 2816, 768):
        assert launch.start([first, 4096], stream=3)
    shape, strides, box, ones = [64, 8, 3], [128, 1024], [32, 4, 1], [1, 1, 1]
    kind = (shape, strides, box, ones, 0, 3, 2, 0)
    assert encoded == [(9, 3, 1024, *kind), (9, 3, 3072, *kind)]
    number, *values = calls[2][4]
    assert number == 30
    assert values == [bytes([1] * 128), 3, 8, 64, 512, 64, 1, 4096, 0, 0]
    codes = ("i", "128s", *"iiiqqq", *"PPP")
    assert launch.layout.format == argument_layout(codes).format


def test_addresses_of_descriptors_are_forgotten(encoded):
    launch = launch_of_descriptor()
    for address in range(600):
        assert launch.start([1024 * (address % 300 + 1) - 256, 4096], stream=3)
        assert len(launch.maps[0][-1]._encoded) <= 256
    assert len(encoded) == 600


def test_a_descriptor_that_the_driver_refuses_is_left_to_triton(calls, encoded):
    assert not launch_of_descriptor().start([-256, 4096], stream=3)
    assert not calls


@pytest.mark.usefixtures("encoded")
@pytest.mark.parametrize(
    "changes",
    [
        {"box": None},
        {"box": BOX | {"fp4_padded": True}},
        {"box": BOX | {"elem_type": 4}},
        {"ptx": PTX_OF_DESCRIPTOR.replace("[128]", "[64]")},
        {"ptx": PTX_OF_DESCRIPTOR.replace(".u32 add_param_2,\n", ".u64 add_param_2,\n")},
    ],
    ids=["no box", "fp4", "element", "size", "type"],
)
def test_other_descriptors_are_left_to_triton(changes):
    assert launch_of_descriptor() is not None
    assert launch_of_descriptor(**changes) is None


@pytest.mark.parametrize(
    "launch",
    [
        recorded(num_ctas=2),
        recorded(global_scratch_size=64),
        recorded(launch_cooperative_grid=True),
        recorded(SIGNATURE | {"x": "tensordesc<bf16[64, 64]>"}),
        recorded(ptx=PTX.replace(".f32 add_param_3", ".f64 add_param_3")),
        recorded(ptx=PTX.replace("param_5\n", "param_5,\n .param .u64 add_param_6\n")),
        Launch(None, (1, 1, 1), [torch.empty(1)], {}, None),
    ],
    ids=["cluster", "scratch", "cooperative", "descriptor", "type", "parameter", "interpreted"],
)
def test_other_launches_are_left_to_triton(launch):
    assert driver_launch.driver_launch(launch, {}) is None
