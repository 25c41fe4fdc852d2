"""Every hook works in a plugin, and has a docstring."""

import inspect

import pytest

from tokenyard import KINDS, hookspecs
from tokenyard.registry._registry import HOOKS

SPECS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("tokenyard_")}


def test_kinds_and_hooks_correspond():
    assert set(HOOKS) == set(KINDS)
    assert set(HOOKS.values()) == set(SPECS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_offers_a_backend_by_its_hook(kind, install, registry):
    install(
        "one-plugin",
        "from tokenyard import Backend, hookimpl\n"
        f"@hookimpl\ndef {HOOKS[kind]}():\n    return [Backend('mine', 'os:sep')]\n",
    )
    assert "mine" in [o.backend.name for o in registry().offers(kind)]
    assert inspect.getdoc(SPECS[HOOKS[kind]])


def test_a_hook_that_does_not_exist_is_named(install, registry):
    install(
        "misspelt",
        "from tokenyard import Backend, hookimpl\n"
        "@hookimpl\ndef tokenyard_router():\n    return [Backend('mine', 'os:sep')]\n",
    )
    (problem,) = [p for p in registry().problems if p.distribution == "misspelt"]
    assert (
        "hook 'tokenyard_router' is unknown (did you mean 'tokenyard_routers'?)" in problem.reason
    )
