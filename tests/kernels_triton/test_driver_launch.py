"""A recorded launch gives the driver what Triton's launcher would give it; without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import triton

from tokenyard_kernels_triton import driver_launch
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
    assert launch.layout.format == "@PiPfPP"


def test_a_refusal_is_reported():
    """Triton's launcher then launches, and raises the error."""
    assert not driver_launch.driver_launch(recorded(), {}).start([], stream=0)


def test_hooks_are_left_to_triton(monkeypatch, calls):
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    assert not driver_launch.driver_launch(recorded(), {}).start([], stream=3)
    assert not calls


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
