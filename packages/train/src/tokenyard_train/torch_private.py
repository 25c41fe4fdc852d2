"""What tokenyard_train uses of torch's private names; each is tried by a test, and does nothing where it is gone."""

from __future__ import annotations

import torch


def keep_compiler_out_of_optimizers() -> None:
    """Let an optimizer be constructed without importing ``torch._dynamo``, which takes 1 second.

    Its methods are wrapped by ``torch._disable_dynamo``, which imports the compiler on the first call in order to keep
    the method out of compiled graphs. We never compile an optimizer, so each wrapper is told that this is done.
    """
    for name in ("add_param_group", "zero_grad"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)
