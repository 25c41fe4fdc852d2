"""Every hook works from a plugin, and says in its docstring what it is for."""

import inspect

import pytest

from tokenyard import KINDS, hookspecs
from tokenyard.registry._registry import HOOKS

SPECS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("tokenyard_")}


def test_every_kind_has_a_hook_and_every_hook_a_kind():
    assert set(HOOKS) == set(KINDS)
    assert set(HOOKS.values()) == set(SPECS)


@pytest.mark.parametrize("kind", KINDS)
def test_hook_brings_its_backend(kind, install, registry):
    install(
        "one-plugin",
        "from tokenyard import Backend, hookimpl\n"
        f"@hookimpl\ndef {HOOKS[kind]}():\n    return [Backend('mine', 'os:sep')]\n",
    )
    assert "mine" in [o.backend.name for o in registry().offers(kind)]
    assert inspect.getdoc(SPECS[HOOKS[kind]])
