"""Runs that repeat bit by bit.

Our own kernels always do: they have no atomics, and sum in a fixed order. What differs from run to run on a GPU is
torch's: the gradient of the embedding adds by atomics, attention's backward pass (flash, cuDNN) may, and cuBLAS may
choose another algorithm when a workspace is shared by streams. ``torch.use_deterministic_algorithms`` has another way
for each of them; for what has none, torch raises, and the run ends with a sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenyard import ConfigError

COST = "a step takes 8 to 13 % longer on an H200"
"""What it costs on a GPU, as measured in docs/benchmarks."""

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (
    ":4096:8",
    ":16:8",
)  # the values with which cuBLAS repeats its results, by its documentation
_NO_OTHER_WAY = re.compile(r"([^:\n]+?) does not have a deterministic implementation")


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, if `asked`. Raises ConfigError for an operation that has none.

    Enter it before the first matmul on a GPU: cuBLAS reads its environment variable once.
    """
    if not asked:
        yield
        return
    if (given := os.environ.setdefault(_WORKSPACE, _FIXED[0])) not in _FIXED:
        raise ConfigError(
            f"deterministic is true, but {_WORKSPACE} is {given!r}; unset it, or give {_FIXED[0]}"
        )
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if (found := _NO_OTHER_WAY.search(str(error))) is None:
            raise
        raise ConfigError(
            f"deterministic is true, but torch has no deterministic implementation of {found[1]} here; change what "
            "uses it, or set deterministic: false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
