"""Runs that repeat bit by bit.

Our kernels always do: they use no atomics and sum in a fixed order. On a GPU, torch's do not: the
gradient of the embedding adds by atomics, attention's backward pass (flash, cuDNN) may, and cuBLAS
may choose another algorithm when streams share a workspace. ``torch.use_deterministic_algorithms``
replaces each of them. For an operation without a replacement torch raises, and the run ends with
one sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenyard import ConfigError

COST = "a step takes 8 to 13 % longer on an H200"
"""The cost on a GPU, as measured in docs/benchmarks."""

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (":4096:8", ":16:8")  # with these cuBLAS repeats its results, by its documentation
_NOT_DETERMINISTIC = re.compile(r"([^:\n]+?) does not have a deterministic implementation")


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Context: if `enabled`, torch uses deterministic algorithms only.

    Raises ConfigError for an operation that has none. Enter it before the first matmul on a GPU:
    cuBLAS reads its environment variable once.
    """
    if not enabled:
        yield
        return
    workspace = os.environ.setdefault(_WORKSPACE, _FIXED[0])
    if workspace not in _FIXED:
        raise ConfigError(
            f"deterministic is true, but {_WORKSPACE} is {workspace!r}; unset it, or give "
            f"{_FIXED[0]}"
        )
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        operation = _NOT_DETERMINISTIC.search(str(error))
        if operation is None:
            raise
        raise ConfigError(
            "deterministic is true, but torch has no deterministic implementation of "
            f"{operation[1]} here; change what uses it, or set deterministic: false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
