"""Counts of the hooks on a model, to notice later ones: a CUDA graph does not call them."""

from __future__ import annotations

from torch import nn

_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Hooks:
    """Tells whether a model's modules or parameters have other hooks than at the start.

    The GPU waits for the answer, so the dicts of hooks are looked up once. If a parameter or such a
    dict is replaced, its later hooks are not noticed.
    """

    def __init__(self, model: nn.Module):
        self.by_module = {
            name: [getattr(module, hooks) for hooks in _MODULE_HOOKS]
            for name, module in model.named_modules()
        }
        self.parameters = dict(model.named_parameters())
        self.at_start = self._counts()

    def changed(self) -> str | None:
        """Return which module got a hook, on itself or on a parameter, or None."""
        counts = self._counts()
        if counts == self.at_start:
            return None
        names = [*self.by_module, *(name.rpartition(".")[0] for name in self.parameters)]
        changes = zip(names, counts, self.at_start, strict=True)
        name = next(name for name, now, before in changes if now != before)
        return f"{name or 'the model'} got a hook, which a graph does not call"

    def _counts(self) -> list[int]:
        counts = [sum(map(len, dicts)) for dicts in self.by_module.values()]
        for parameter in self.parameters.values():
            # None without a hook
            dicts = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
            counts.append(sum(len(hooks) for hooks in dicts if hooks))
        return counts
