"""Replay the launches of a function with new tensors, without the Python between them.

Triton's launch function and the code that prepares its arguments take several times as long as the
driver's launch. For few tokens that is longer than the kernels. So the second call with a key
records what the function allocates and launches. Later calls repeat it: the same compiled kernels,
grids and numbers, with the addresses of their own tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenyard_kernels_triton.launching import Launch, can_record, recording
from tokenyard_kernels_triton.program import Program, ProgramBuilder

Tensors = Sequence[Tensor | None]

_MOST = 512
"""Keys that are remembered. The one that was used least recently is forgotten first."""

_VIEWS = frozenset(("slice", "select", "view", "detach", "alias"))
_ALLOCATIONS = frozenset(("new_empty", "empty", "empty_like"))


@dataclass
class _Entry:
    """A key's program, or whether it can have one."""

    program: Program | None = None
    possible: bool = True


_entries: OrderedDict[Hashable, _Entry] = OrderedDict()


def replayed(
    key: Hashable, function: Callable[..., tuple[Tensor, ...]], tensors: Tensors
) -> tuple[Tensor, ...]:
    """Return ``function(*tensors)``, replayed if it was recorded with this key.

    The function launches kernels by ``launching.launch``, and allocates and views tensors. If it
    calls any other operator of torch, it is never replayed. `key` names the function, and
    determines the shapes and strides of all tensors, and each number that a launch gets.
    """
    if not can_record():
        return function(*tensors)
    full_key = (key, *map(_kind, tensors))
    entry = _entries.get(full_key)
    if entry is None:
        _remember(full_key)
        return function(*tensors)
    try:
        _entries.move_to_end(full_key)
    except KeyError:  # another thread forgot it
        _entries[full_key] = entry
    if entry.program is not None:
        return entry.program.run(tensors)
    if not entry.possible or _overlap(tensors):
        return function(*tensors)
    recorder = _Recorder(tensors)
    with recording(recorder.launched), recorder:
        outputs = function(*tensors)
    entry.program = recorder.program(outputs)
    entry.possible = entry.program is not None
    return outputs


def _kind(tensor: Tensor | None) -> Hashable:
    """Return what selects a compiled kernel besides the key: dtype, device and alignment."""
    return None if tensor is None else (tensor.dtype, tensor.get_device(), tensor.data_ptr() % 16)


def _remember(key: Hashable) -> None:
    _entries[key] = _Entry()
    if len(_entries) > _MOST:
        _entries.popitem(last=False)


def _overlap(tensors: Tensors) -> bool:
    """Return whether two tensors share memory: a recorded address could belong to either."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for tensor in tensors
        if tensor is not None and tensor.numel()
    )
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


class _Recorder(TorchDispatchMode):
    """Sees the allocations, the launches and every other operator of a function."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        self.builder = ProgramBuilder(tensors)
        self.possible = True

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        name = op.name().removeprefix("aten::").partition(".")[0]
        if name in _ALLOCATIONS:
            self.builder.allocate(result)
        elif name not in _VIEWS:
            self.possible = False
        return result

    def launched(self, launch: Launch) -> None:
        """Add a launch. It ran already."""
        self.possible = self.possible and self.builder.launch(launch)

    def program(self, outputs: tuple[Tensor, ...]) -> Program | None:
        """Return the program of the calls so far; None if they cannot be replayed."""
        return self.builder.build(outputs) if self.possible else None
