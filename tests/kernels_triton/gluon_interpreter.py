"""Run Gluon kernels for Hopper GPUs on a CPU, which Triton's own interpreter cannot.

It runs a kernel's Python with a language of torch tensors. All programs run at the same time, in a
random order (``interleaving``). Each warp group and the loader are a thread, which wait for each
other at the kernel's barriers: a wrong count or phase is a deadlock, which is reported. Copies and
matmuls that are asynchronous happen at any time before the kernel waits for them. Shared memory
starts as NaN. TMA addresses wrap around 2^64, as ragged rows need, and each access to memory is
checked against its tensor. It knows nothing of layouts, fences and registers: compiling checks the
first and the last, and only a GPU the second.
"""

import importlib
import math
import random
import threading
import types
from types import SimpleNamespace

import torch

from .interleaving import Interleaving

KERNELS = (
    "_gluon_fp8_rows",
    "_gluon_fp8_up",
    "_gluon_fp8_gradient",
    "_gluon_fp8_tiles",
    "_gluon_columns",
    "_gluon_rows",
    "_gluon_up",
    "_gluon_block_sparse",
    "_gluon_differentiate",
    "_gluon_gather",
    "_gluon_symmetric",
    "_gluon_loads",
    "_gluon_pipeline",
    "_gluon_queue",
    "_schedule",
    "_activations",
)
LAUNCHERS = ("ops._gluon", "ops._gluon_fp8", "ops._symmetric", "block_sparse._gluon")
SEED = None  # of the order of each launch; that of a failure repeats it

_launch = SimpleNamespace(now=None)  # the Interleaving of the threads of a launch


class _Thread(threading.local):
    """What a warp group or a loader has begun, in its order."""

    program = 0

    def __init__(self):
        self.copies = []
        self.stores = []
        self.matmuls = []


_thread = _Thread()


class Dtype:
    """A number's type in the language."""

    def __init__(self, torch_dtype):
        self.torch = torch_dtype
        self.primitive_bitwidth = 8 * torch_dtype.itemsize

    @property
    def element_ty(self):
        return self


def plain(value):
    return value.tensor if isinstance(value, Value) else value


class Value:
    """A tensor or scalar in registers."""

    def __init__(self, tensor):
        self.tensor = torch.as_tensor(tensor)

    @property
    def dtype(self):
        return Dtype(self.tensor.dtype)

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def to(self, dtype):
        tensor = self.tensor
        if dtype.torch == torch.float8_e4m3fn:
            tensor = tensor.clamp(-448, 448)  # the GPU's conversion saturates, and keeps NaN
        return Value(tensor.to(dtype.torch))

    def reshape(self, shape):
        return Value(self.tensor.reshape(shape))

    def permute(self, order):
        return Value(self.tensor.permute(order))

    def split(self):
        return tuple(Value(half) for half in self.tensor.unbind(-1))

    def __getitem__(self, key):
        return Value(self.tensor[key])

    def __bool__(self):
        return bool(self.tensor)

    def __index__(self):
        return int(self.tensor)


def _add_operators():
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or"):

        def forward(self, other, name=f"__{name}__"):
            if isinstance(other, Pointer):
                return other + self
            return Value(getattr(self.tensor, name)(plain(other)))

        def backward(self, other, name=f"__{name}__"):
            return Value(getattr(torch.as_tensor(other), name)(self.tensor))

        setattr(Value, f"__{name}__", forward)
        setattr(Value, f"__r{name}__", backward)
    for name in ("lt", "le", "gt", "ge", "eq"):

        def compare(self, other, name=f"__{name}__"):
            return Value(getattr(self.tensor, name)(plain(other)))

        setattr(Value, f"__{name}__", compare)
    Value.__neg__ = lambda self: Value(-self.tensor)


class Pointer:
    """Addresses of numbers of a tensor."""

    def __init__(self, memory, offset=0):
        self.memory = memory  # flat
        self.offset = torch.as_tensor(offset)

    @property
    def dtype(self):
        return Dtype(self.memory.dtype)

    def __add__(self, other):
        return Pointer(self.memory, self.offset + plain(other))

    def at(self, mask):
        """Return the offsets and the mask, of one shape; fail for an address outside the tensor."""
        mask = torch.as_tensor(True if mask is None else plain(mask))
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        used = offset[mask]
        outside = ((used < 0) | (used >= self.memory.numel())).any()
        assert not outside, f"address {used} is outside of {self.memory.numel()} numbers"
        return torch.where(mask, offset, 0), mask


def load(pointer, mask=None, other=0.0):
    if pointer.memory.numel() == 0:
        assert not torch.as_tensor(plain(mask)).any()
        return Value(torch.zeros(torch.broadcast_shapes(pointer.offset.shape, mask.tensor.shape)))
    offset, mask = pointer.at(mask)
    zero = torch.zeros((), dtype=pointer.memory.dtype)
    values = bits(pointer.memory)[offset]
    return Value(unbits(torch.where(mask, values, bits(zero)), pointer.memory.dtype))


def store(pointer, value, mask=None):
    _launch.now.wait()
    offset, mask = pointer.at(mask)
    values = torch.broadcast_to(
        torch.as_tensor(plain(value)).to(pointer.memory.dtype), offset.shape
    )
    bits(pointer.memory)[offset[mask]] = bits(values.contiguous())[mask]


def atomic_add(pointer, value, mask, sem):
    """Add to one number, and return what was there."""
    _launch.now.wait()
    offset, mask = pointer.at(mask)
    before = pointer.memory[offset].clone()
    assert mask.sum() <= 1
    pointer.memory[offset[mask]] += value.tensor[mask]
    return Value(before)


def bits(tensor):
    """View float8 as bytes, which torch can index and compare."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def unbits(tensor, dtype):
    return tensor.view(dtype) if dtype == torch.float8_e4m3fn else tensor


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, tensor):
        self.tensor = tensor

    @property
    def dtype(self):
        return Dtype(self.tensor.dtype)

    def index(self, number):
        return Shared(self.tensor[int(number)])

    def slice(self, start, length, dim=0):
        return Shared(self.tensor.narrow(dim, start, length))

    def reshape(self, shape):
        return Shared(self.tensor.view(shape))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def load(self, layout):
        _launch.now.wait()
        return Value(self.tensor.clone())

    def store(self, value):
        _launch.now.wait()
        assert value.tensor.dtype == self.tensor.dtype
        bits(self.tensor).copy_(bits(value.tensor.contiguous()))


class Pairs:
    """Boxes in shared memory of which two, side by side, are a slice."""

    def __init__(self, boxes, stages, by_depth):
        self.boxes = boxes
        self.axis = 1 if by_depth else 0

    def index(self, number):
        pair = self.boxes.tensor[2 * int(number) : 2 * int(number) + 2, 0]
        return Shared(torch.cat(tuple(pair), self.axis))


def allocate(dtype, shape, layout):
    shape = [int(size) for size in shape]
    if dtype.torch == torch.int64:
        return [SimpleNamespace(count=0, arrived=0, bytes=0, phase=0) for _ in range(shape[0])]
    return Shared(torch.full(shape, math.nan).to(dtype.torch))  # garbage if of integers


class Barriers(list):
    """Barriers of the stages."""

    def index(self, number):
        return self[int(number)]


class Descriptor:
    """A TMA descriptor of a tensor."""

    def __init__(self, described):
        self.memory = described.base.reshape(-1)
        self.shape = described.shape
        self.strides = described.strides
        box = described.block_shape
        size = self.memory.element_size()
        self.block_type = SimpleNamespace(shape=list(box), nbytes=math.prod(box) * size)
        self.dtype = Dtype(self.memory.dtype)
        self.layout = None

    def at(self, coordinates):
        """Return the offsets of a box, and which of its numbers exist."""
        offset = torch.zeros((), dtype=torch.int64)
        inside = torch.ones((), dtype=torch.bool)
        for axis, (first, size) in enumerate(zip(coordinates, self.block_type.shape)):
            index = int(first) + torch.arange(size)
            view = [1] * len(self.shape)
            view[axis] = size
            offset = offset + (index * self.strides[axis]).view(view)  # wraps around 2^64
            inside = inside & ((index >= 0) & (index < self.shape[axis])).view(view)
        used = offset[inside]
        assert ((used >= 0) & (used < self.memory.numel())).all(), "a box outside of its tensor"
        return offset, inside


def copy(target, pointers, mask):
    """Start copying by threads to shared memory (cp.async)."""
    offset, mask = pointers.at(mask)

    def move():
        zero = torch.zeros((), dtype=pointers.memory.dtype)
        values = torch.where(mask, bits(pointers.memory)[offset], bits(zero))
        bits(target.tensor).copy_(values)

    _thread.copies.append(_later(move))


def tma_load(descriptor, coordinates, barrier, target):
    offset, inside = descriptor.at(coordinates)

    def move():
        values = bits(descriptor.memory)[torch.where(inside, offset, 0)]
        zero = torch.zeros((), dtype=values.dtype)
        bits(target.tensor).copy_(torch.where(inside, values, zero).view(target.tensor.shape))
        _complete(barrier, tx=-descriptor.block_type.nbytes)

    _later(move)


def tma_store(descriptor, coordinates, source):
    offset, inside = descriptor.at(coordinates)

    def move():
        values = bits(source.tensor).view(inside.shape)
        bits(descriptor.memory)[offset[inside]] = values[inside]

    _thread.stores.append(_later(move))


def tma_add(descriptor, coordinates, source):
    offset, inside = descriptor.at(coordinates)

    def move():
        descriptor.memory[offset[inside]] += source.tensor.view(inside.shape)[inside]

    _thread.stores.append(_later(move))


def store_wait(count):
    _wait_for(_thread.stores, count)


def _later(call, ready=lambda: True):
    """Call a function at any time from now on, in any thread."""
    return _launch.now.later(torch.no_grad()(call), ready)


def _wait_for(tasks, count):
    """Wait until at most the last `count` tasks are not over."""
    first = tasks[: len(tasks) - count]
    _launch.now.wait(lambda: all(task.over for task in first))
    del tasks[: len(first)]


def init(barrier, count):
    barrier.count = count


def expect(barrier, size):
    _complete(barrier, tx=size, arrivals=1)


def arrive(barrier, count=1, pred=True):
    _launch.now.wait()
    if pred:
        _complete(barrier, arrivals=count)


def arrive_of_copies(barrier, increment_count=True):
    """Arrive once for each thread of the four warps that copy, after their copies."""
    assert not increment_count
    before = _thread.copies
    arrival = _later(
        lambda: _complete(barrier, arrivals=128), lambda: all(task.over for task in before)
    )
    _thread.copies = [arrival]


def _complete(barrier, tx=0, arrivals=0):
    barrier.bytes += tx
    barrier.arrived += arrivals
    assert barrier.arrived <= barrier.count, "more arrivals than the barrier counts"
    if barrier.arrived == barrier.count and barrier.bytes == 0:
        barrier.arrived = 0
        barrier.phase += 1


def wait(barrier, phase):
    """Wait until the phase of this parity is over."""
    _launch.now.wait(lambda: barrier.phase % 2 != int(phase))


def specialize(partitions, warps, registers):
    """Run each partition in a thread of its own."""
    _launch.now.together(
        [_thread_of(_thread.program, function, arguments) for function, arguments in partitions]
    )


def _thread_of(program, function, arguments=(), constants=None):
    """Return a function that a thread of a program runs."""

    def run():
        _thread.program = program
        with torch.no_grad():  # a thread has its own mode
            function(*arguments, **constants or {})

    return run


def mma(left, right, total, use_acc=True, is_async=False):
    """Start multiplying; the result has no numbers before the kernel has waited for it."""
    result = Value(0)
    del result.tensor
    add = bool(use_acc)

    def multiply():
        start = total.tensor if add else torch.zeros_like(total.tensor)
        result.tensor = _multiply(left.tensor, right.tensor, start)

    before = _thread.matmuls[-1:]  # they end in their order
    task = _later(multiply, lambda: all(matmul.over for matmul in before))
    _thread.matmuls.append(task)
    if not is_async:
        _wait_for(_thread.matmuls, 0)
    return result


def _multiply(left, right, start):
    """Multiply; sums of e4m3 have 14 bits, and lose the others after each 32 numbers."""
    if left.dtype != torch.float8_e4m3fn:
        return start + left.float() @ right.float()
    for first in range(0, left.shape[1], 32):
        some = slice(first, first + 32)
        start = start + left[:, some].float() @ right[some].float()
        mantissa, exponent = torch.frexp(start)
        start = torch.ldexp((mantissa * 2**14).trunc() / 2**14, exponent)
    return start


def mma_wait(count, deps):
    _wait_for(_thread.matmuls, count)
    return deps[0] if len(deps) == 1 else tuple(deps)


def maximum_of(value, axis):
    """Return the largest number along an axis. NaN is ignored, as by the GPU."""
    return Value(value.tensor.nan_to_num(nan=-math.inf, posinf=math.inf).amax(axis))


def either(one, other, function):
    return Value(function(torch.as_tensor(plain(one)), torch.as_tensor(plain(other))))


def language():
    """Return the functions of ``gl`` and ``tl`` that the kernels call."""
    return SimpleNamespace(
        float32=Dtype(torch.float32),
        int32=Dtype(torch.int32),
        int64=Dtype(torch.int64),
        constexpr=lambda value: value,
        program_id=lambda axis: _thread.program,
        arange=lambda start, end, layout=None: Value(torch.arange(start, end)),
        zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype.torch)),
        load=load,
        store=store,
        atomic_add=atomic_add,
        where=lambda mask, *values: Value(
            torch.where(torch.as_tensor(plain(mask)), *map(plain, values))
        ),
        cdiv=lambda number, by: -(-number // by),
        static_range=range,
        full=lambda shape, value, dtype, layout: Value(torch.full(shape, value)),
        sum=lambda value, axis: Value(value.tensor.sum(axis)),
        max=maximum_of,
        abs=lambda value: Value(value.tensor.abs()),
        exp=lambda value: Value(value.tensor.exp()),
        erf=lambda value: Value(value.tensor.erf()),
        maximum=lambda one, other, nan=None: either(one, other, torch.fmax),
        minimum=lambda one, other, nan=None: either(one, other, torch.fmin),
        clamp=lambda value, low, high, nan=None: Value(value.tensor.clamp(low, high)),
        PropagateNan=SimpleNamespace(ALL=None),
        join=lambda one, other: Value(torch.stack((one.tensor, other.tensor), -1)),
        convert_layout=lambda value, layout, assert_trivial=False: value,
        allocate_shared_memory=lambda *arguments: _shared(allocate(*arguments)),
        warp_specialize=specialize,
        SliceLayout=lambda *arguments: None,
        DotOperandLayout=lambda *arguments: None,
        NVMMADistributedLayout=lambda *arguments, **options: None,
        NVMMASharedLayout=lambda *arguments, **options: None,
        SwizzledSharedLayout=lambda *arguments: None,
        BlockedLayout=lambda *arguments, **options: None,
    )


def _shared(allocated):
    return Barriers(allocated) if isinstance(allocated, list) else allocated


def _round_and_widen(tile, dtype):
    rounded = tile.to(dtype)
    return rounded, rounded.to(Dtype(torch.float32))


def _replacements():
    """Return name -> what replaces it in the modules of kernels."""
    return {
        "gl": language(),
        "tl": language(),
        "mbarrier": SimpleNamespace(
            init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: None
        ),
        "tma": SimpleNamespace(store_wait=store_wait),
        "async_copy": SimpleNamespace(mbarrier_arrive=arrive_of_copies),
        "load": tma_load,  # of TMA
        "store": tma_store,
        "add": tma_add,
        "_copy": copy,
        "fence_async_shared": lambda: None,
        "_pairs": Pairs,
        "round_pairs": lambda tile, dtype: tile.to(dtype),
        "round_and_widen": _round_and_widen,
        "_logistic": lambda z, ptx: Value(z.tensor.sigmoid()),
        "warpgroup_mma": mma,
        "warpgroup_mma_wait": mma_wait,
    }


def _namespaces():
    """Return module -> its names, with functions that call this language and each other."""
    package = "tokenyard_kernels_triton.kernels."
    modules = [importlib.import_module(package + name) for name in KERNELS]
    spaces = {module.__name__: dict(vars(module)) for module in modules}
    replacements = _replacements()
    for space in spaces.values():
        for key, value in space.items():
            if key in replacements:
                space[key] = replacements[key]
            elif type(value).__name__ == "constexpr":
                space[key] = value.value
            elif hasattr(value, "fn"):  # a kernel, a device function or one of constants
                space[key] = _function(value.fn, spaces)
    return spaces


def _function(function, spaces):
    """Return a function with the names of its module in `spaces`."""
    code, name, defaults = function.__code__, function.__name__, function.__defaults__
    return types.FunctionType(code, spaces[function.__module__], name, defaults)


def _argument(argument):
    if isinstance(argument, torch.Tensor):
        return Pointer(argument.detach().reshape(-1))
    return Descriptor(argument) if hasattr(argument, "block_shape") else argument


def install(monkeypatch):
    """Run the matmuls of the modules LAUNCHERS until the end of a test."""
    spaces = _namespaces()

    def launch(kernel, grid):
        def run(*arguments, num_warps, maxnreg, **constants):
            inputs = [_argument(argument) for argument in arguments]
            function = _function(kernel.fn, spaces)
            seed = random.randrange(2**32) if SEED is None else SEED
            _launch.now = Interleaving(seed)
            _launch.now.together(
                [_thread_of(number, function, inputs, constants) for number in range(grid[0])]
            )

        return run

    for name in LAUNCHERS:
        ops = importlib.import_module(f"tokenyard_kernels_triton.{name}")
        monkeypatch.setattr(ops, "launch", launch)


_add_operators()
