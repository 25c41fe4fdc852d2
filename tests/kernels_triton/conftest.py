"""Let Triton's interpreter replace the functions of its language once per launch.

It does so again in every call of a device function, which takes a quarter of the time of a kernel.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

_LANGUAGE = "triton.language"


class _Scope:
    """The replaced functions of a launch."""

    def __init__(self, inner: Any, replaced: set[str]):
        self.inner = inner
        self.replaced = replaced

    def restore(self) -> None:
        self.replaced.clear()
        self.inner.restore()


@pytest.fixture(scope="session", autouse=True)
def replaced_once():
    """Replace a private function of the interpreter, if this version of Triton has it."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    replace = getattr(interpreter, "_patch_lang", None)
    if replace is None:
        yield
        return
    replaced: set[str] = set()  # names of modules

    def replace_once(function: Any) -> Any:
        modules = {
            name
            for value in function.__globals__.values()
            if (name := getattr(value, "__name__", "")) in (_LANGUAGE, f"{_LANGUAGE}.core")
        }
        is_launch = not replaced
        if modules <= replaced:
            return None
        replaced.update(modules)
        scope = replace(function)
        return _Scope(scope, replaced) if is_launch else scope

    interpreter._patch_lang = replace_once
    yield
    interpreter._patch_lang = replace
