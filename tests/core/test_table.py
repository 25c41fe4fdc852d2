"""``python -m tokenyard`` shows the installed backends, with a reason for each unusable one."""

from tokenyard.__main__ import main
from tokenyard.registry import default_registry
from tokenyard.table import render, sample_workload


def test_the_table_names_every_backend_with_its_reason(offer, install, registry):
    offer("fast-experts", "fast", reason="'fast' needs a GPU")
    install("broken-experts", "import no_such_module_anywhere")
    text = render(registry(), sample_workload())
    lines = [line.split() for line in text.splitlines()]
    assert ["experts", "fast", "fast-experts", "1.0", "'fast'", "needs", "a", "GPU"] in lines
    assert any(line[:2] == ["experts", "torch"] and line[-1] == "usable" for line in lines)
    assert (
        "left out: plugin 'plugin' (broken_experts_plugin) of broken-experts 1.0 failed to import"
        in text
    )


def test_a_router_of_another_algorithm_is_usable_for_that(install, registry):
    install(
        "hash-router",
        """
from tokenyard import Backend, hookimpl

@hookimpl
def tokenyard_routers():
    unusable = lambda workload: None if workload.router.algorithm == "hash" else "another"
    return [Backend("hash", "tokenyard.routers:TopKRouter", 1, unusable, algorithm="hash")]
""",
    )
    text = render(registry(), sample_workload())
    (line,) = [line for line in text.splitlines() if "hash-router" in line]
    assert line.endswith("  usable, for the routing algorithm 'hash'")


def test_conflicting_plugins_are_left_out(offer, capsys):
    offer("fast-experts", "fast")
    offer("quick-experts", "fast")
    default_registry.cache_clear()
    try:
        assert main() == 0
    finally:
        default_registry.cache_clear()
    printed = capsys.readouterr().out
    assert "left out: experts backend 'fast' is offered by both" in printed
    assert not [line for line in printed.splitlines() if line.split()[:2] == ["experts", "fast"]]
