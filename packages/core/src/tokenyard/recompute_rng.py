"""Random numbers of recomputed functions in a CUDA graph.

Outside of a capture, torch saves the generator's state in the forward pass of a function, and
restores it for the recompute. In a capture it cannot: captured kernels read seed and offset from
memory that each replay fills, and the offset within the graph only grows. So each recompute draws
from a generator of its own, which each replay sets to where the function's forward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from itertools import repeat

import torch

Draws = AbstractContextManager[None]
"""Context of a recompute. It draws the random numbers of the forward pass in there."""

_next_call: ContextVar[Callable[[], Draws | None] | None] = ContextVar(
    "tokenyard_recompute_rng", default=None
)


def draws_of_next_call() -> Draws | None:
    """Return the context in which the next recomputed function runs again; None outside captures.

    None means that torch restores the generator.
    """
    next_call = _next_call.get()
    return None if next_call is None else next_call()


class RecomputeRng:
    """Generators of the recomputed functions of one pass, for its capture and its replays.

    1. `recording` is around a pass without a graph. It notes where each function begins to draw.
    2. `register` gives the generators to the graph, before the capture.
    3. `capturing` is around the capture.
    4. `rewind` comes before each replay.

    `main` is the generator from which the forward pass draws, by default that of the current GPU.
    """

    def __init__(self, main: torch.Generator | None = None):
        if main is None:
            main = torch.cuda.default_generators[torch.cuda.current_device()]
        self.main = main
        self.starts: list[int] = []  # of each function, from the offset where the pass begins
        self.generators: list[torch.Generator] = []  # none if nothing is drawn

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context of a pass that draws as the captured one will."""
        begin = self.main.get_offset()

        def note() -> None:
            self.starts.append(self.main.get_offset() - begin)

        with _calling(note):
            yield
        if self.main.get_offset() == begin:
            self.starts.clear()

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """Give the graph a generator for each function, if anything is drawn."""
        self.generators = [torch.Generator(self.main.device) for _ in self.starts]
        for generator in self.generators:
            graph.register_generator_state(generator)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Context of the capture."""
        draws: Iterator[Draws] = repeat(nullcontext())
        if self.generators:
            draws = map(self._drawing_from, self.generators)
        with _calling(partial(next, draws)):
            yield

    def rewind(self) -> None:
        """Set the generators to where the next replay's functions begin to draw."""
        offset = self.main.get_offset() if self.generators else 0
        for generator, start in zip(self.generators, self.starts):
            generator.manual_seed(self.main.initial_seed())
            generator.set_offset(offset + start)

    @contextmanager
    def _drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        """Context in which torch's functions draw from another generator than the main one."""
        before = self.main.graphsafe_get_state()
        self.main.graphsafe_set_state(generator)
        try:
            yield
        finally:
            self.main.graphsafe_set_state(before)


@contextmanager
def _calling(next_call: Callable[[], Draws | None]) -> Iterator[None]:
    token = _next_call.set(next_call)
    try:
        yield
    finally:
        _next_call.reset(token)
