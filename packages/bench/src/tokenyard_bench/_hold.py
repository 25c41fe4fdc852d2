"""A kernel that occupies multiprocessors until a flag in memory is set.

Triton is optional here: without it, the module has no kernel.
"""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import globaltimer

    @triton.jit
    def hold(
        state,  # [2]: nonzero to end; set if the time ran out
        nanoseconds,  # after which it ends on its own
    ):
        """Wait until the first number of `state` is not zero."""
        end = globaltimer() + nanoseconds
        while (tl.load(state, volatile=True) == 0) & (globaltimer() < end):
            pass
        tl.store(state + 1, 1, mask=tl.load(state, volatile=True) == 0)
