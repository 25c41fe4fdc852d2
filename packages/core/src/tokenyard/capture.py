"""Capture CUDA graphs. A capture that fails leaves torch as it was before."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_failed: list[torch.cuda.CUDAGraph] = []  # the allocator of host memory keeps their addresses


@contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Context that captures a graph on the current GPU, as ``torch.cuda.graph`` does.

    If the driver cannot end a capture, ``torch.cuda.graph`` cleans nothing up. Its stream stays the
    current one, the allocator no longer frees memory that several streams used, and up to torch
    2.11 the default generator raises when it draws. Here all of that works again afterwards.

    ``torch._C._cuda_endAllocateToPool`` and ``_cuda_releasePool`` are private: torch 2.10 to 2.13.
    """
    stream = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    cause: BaseException | None = None
    try:
        try:
            with torch.cuda.graph(graph, pool=pool):
                try:
                    yield
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as end:
            if not _has_ended(graph):
                _clean_up(graph, stream, pool)
            if cause is None or cause is end:
                raise
            # `end` only says that there was an error
            end.with_traceback(None).__context__ = None
        if cause is not None:
            raise cause  # here, where `end` does not become its context
    finally:
        # An error and a frame that keep each other would keep the captured work alive, too
        cause = None


def _clean_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    _failed.append(graph)
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    with suppress(RuntimeError):
        torch._C._cuda_releasePool(stream.device_index, pool)
    _end_capture_of_generator()
    torch.cuda.set_stream(stream)


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:  # there is none until a capture has ended
        return False
    return True


def _end_capture_of_generator() -> None:
    """Capture an empty graph: its end sets the default generator to draw without a graph again.

    Another generator state would do so, too, but graphs that exist advance the one of now.
    """
    with suppress(RuntimeError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            pass
