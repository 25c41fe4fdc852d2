"""The registry discovers, chooses and refuses backends, with helpful errors."""

import logging
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from tokenyard import Backend, BackendError, ConfigError, Registry, Workload, __version__, _builtin
from tokenyard.registry import Plugin, _choose, _extras
from tokenyard.registry._offers import Offer
from tokenyard.table import render

WORKLOAD = Workload(8, 8, 4, 2)


def test_a_plugin_of_higher_priority_is_taken_by_auto(offer, registry, caplog):
    offer("fast-experts", "fast", priority=5)
    offer("faster-experts", "faster", priority=9, reason="'faster' needs a unicorn")
    _choose._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "tokenyard"):
        chosen = registry().choose("experts", "auto", WORKLOAD)
        registry().choose("experts", "auto", WORKLOAD)
    assert chosen.backend.name == "fast"
    assert chosen.passed_over == {"faster": "'faster' needs a unicorn"}
    assert caplog.messages == [
        "experts backend: auto took 'fast'; not faster: 'faster' needs a unicorn"
    ]


def test_the_environment_overrides_config_and_config_overrides_auto(offer, registry, monkeypatch):
    offer("fast-experts", "fast", priority=5)
    assert registry().choose("experts", "loop", WORKLOAD).backend.name == "loop"
    monkeypatch.setenv("TOKENYARD_EXPERTS", "torch")
    assert registry().choose("experts", "loop", WORKLOAD).backend.name == "torch"
    monkeypatch.setenv("TOKENYARD_EXPERTS", "trch")
    with pytest.raises(BackendError, match=r"'trch' is unknown .* \(set by TOKENYARD_EXPERTS\)$"):
        registry().choose("experts", "loop", WORKLOAD)


TILED = """
from tokenyard import Backend, hookimpl
from tokenyard.experts import TorchExperts

class Tiled(TorchExperts):
    def __init__(self, work, rows, tile, precision=None):
        super().__init__(work, rows)

class Placed(TorchExperts):
    def __init__(self, *arguments, device="cpu"):
        super().__init__(*arguments)

@hookimpl
def tokenyard_experts():
    return [Backend("tiled", __name__ + ":Tiled", -9), Backend("placed", __name__ + ":Placed", -9)]
"""


def test_options_in_config_reach_the_constructor_of_the_named_backend_only(
    install, registry, monkeypatch
):
    install("tiles", TILED)
    request = {"name": "tiled", "tile": 64}
    assert registry().choose("experts", request, WORKLOAD).options == {"tile": 64}
    monkeypatch.setenv("TOKENYARD_EXPERTS", "loop")
    assert registry().choose("experts", request, WORKLOAD).options == {}


@pytest.mark.parametrize(
    ("kind", "name", "option", "rest"),
    [
        (
            "experts",
            "torch",
            "tile",
            "; name a backend that has it (tiled), or leave it out; the options of 'torch': none",
        ),
        (
            "experts",
            "tiled",
            "presicion",
            " (did you mean 'precision'?); leave it out; the options of 'tiled': tile, precision",
        ),
        ("strategy", "single", "device", "; leave it out; the options of 'single': none"),
    ],
)
def test_an_option_that_a_backend_does_not_have_is_named(
    install, registry, kind, name, option, rest
):
    install("tiles", TILED)
    with pytest.raises(BackendError) as error:
        registry().choose(kind, {"name": name, option: 64})
    key = "parallel.strategy" if kind == "strategy" else "backends.experts"
    assert str(error.value) == f"{key}.{option} is 64, and {name!r} has no such option{rest}"


def test_an_option_may_be_a_keyword_after_any_arguments(install, registry):
    install("tiles", TILED)
    request = {"name": "placed", "device": "meta"}
    assert registry().choose("experts", request, WORKLOAD).options == {"device": "meta"}


def test_an_unknown_backend_gets_a_suggestion(registry):
    with pytest.raises(
        BackendError,
        match=r"experts backend 'trch' is unknown \(did you mean 'torch'\?\); installed: .*torch",
    ):
        registry().choose("experts", "trch", WORKLOAD)


@pytest.fixture
def extras(monkeypatch):
    """Return a function that replaces the entry points of the distribution `tokenyard`."""

    def replace_entry_points(points: dict[str, str]) -> None:
        entry_points = [EntryPoint(name, extra, _extras.GROUP) for name, extra in points.items()]
        monkeypatch.setattr(_extras, "entry_points", lambda group: entry_points)
        _extras.provided_by_extras.cache_clear()

    yield replace_entry_points
    _extras.provided_by_extras.cache_clear()


@pytest.fixture
def core_only():
    return Registry([Plugin(_builtin, "tokenyard-core", "0.1.0")])


def test_an_unknown_backend_names_the_extra_that_provides_it(core_only, extras):
    extras({"model.dbrx": "models"})
    with pytest.raises(
        BackendError,
        match=(
            r"'dbrx' is unknown; installed: none; "
            r"pip install \"tokenyard\[models\]\" provides 'dbrx'"
        ),
    ):
        core_only.choose("model", "dbrx")


def test_auto_without_a_usable_backend_names_an_extra(core_only, extras):
    extras({"exchange.all_to_all": "parallel", "exchange.all_to_all_tokens": "parallel"})
    with pytest.raises(BackendError) as refused:
        core_only.choose("exchange", "auto", replace(WORKLOAD, expert_parallel=2))
    assert str(refused.value).endswith(
        'and expert_parallel is 2); pip install "tokenyard[parallel]" '
        "provides 'all_to_all' and 'all_to_all_tokens'"
    )


def test_core_alone_names_no_extra(core_only, extras):
    extras({})
    with pytest.raises(BackendError, match=r"'dbrx' is unknown; installed: none$"):
        core_only.choose("model", "dbrx")


def test_a_named_backend_is_never_replaced(offer, registry):
    offer("fast-experts", "fast", reason="'fast' needs a GPU")
    with pytest.raises(
        BackendError,
        match=r"'fast' is unusable here: 'fast' needs a GPU; usable here: cpu, torch, loop",
    ):
        registry().choose("experts", "fast", WORKLOAD)


def needs_hopper(workload):
    if workload.capability != (9, 0):
        return "'new' needs a Hopper GPU"
    return None if workload.num_experts == 4 else "'new' needs 4 experts"


def test_a_named_backend_is_planned_for_a_gpu_that_is_not_here(monkeypatch):
    """`auto` takes what each GPU can run. A reason that no GPU changes still counts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    offers = [Offer("experts", Backend("new", "a:B", 5, needs_hopper), "plugin", "1.0")]
    planned = replace(WORKLOAD, device="cuda")
    assert planned.capability is None
    assert _choose.choose("experts", "new", {}, offers, [], planned).backend.name == "new"
    with pytest.raises(BackendError, match="new: 'new' needs a Hopper GPU"):
        _choose.choose("experts", "auto", {}, offers, [], planned)
    for change, reason in (({"capability": (8, 0)}, "a Hopper"), ({"num_experts": 8}, "4 experts")):
        with pytest.raises(BackendError, match=f"'new' is unusable here: 'new' needs {reason}"):
            _choose.choose("experts", "new", {}, offers, [], replace(planned, **change))


def needs_a_new_gpu(workload):
    if workload.capability is None or workload.capability < (12, 0):
        return f"'new' needs 12.0, and this is {workload.capability}"
    return None if workload.num_experts == 4 else "'new' needs 4 experts"


def needs_an_old_gpu(workload):
    is_old = workload.capability is None or workload.capability < (8, 0)
    return None if is_old else "'old' needs an old GPU"


def test_a_plan_is_for_the_newest_gpu_or_for_one_that_a_backend_does_not_refuse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = replace(WORKLOAD, device="cuda", num_experts=8)
    offers = [
        Offer("experts", Backend("new", "a:B", 5, needs_a_new_gpu), "plugin", "1.0"),
        Offer("experts", Backend("old", "a:B", 5, needs_an_old_gpu), "plugin", "1.0"),
    ]
    with pytest.raises(BackendError, match="'new' is unusable here: 'new' needs 4 experts"):
        _choose.choose("experts", "new", {}, offers, [], planned)
    assert _choose.choose("experts", "old", {}, offers, [], planned).backend.name == "old"


def test_a_request_without_a_name_is_refused(registry):
    with pytest.raises(ConfigError, match=r"backends.experts is \{'name': 3\}; give a name"):
        registry().choose("experts", {"name": 3}, WORKLOAD)


def test_a_plugin_that_fails_to_import_does_not_affect_others(install, registry):
    install("broken-experts", "import no_such_module_anywhere")
    rest = registry()
    assert rest.choose("experts", "auto", WORKLOAD).backend.name == "cpu"
    with pytest.raises(
        BackendError,
        match=r"broken-experts 1.0 failed to import: ModuleNotFoundError.*no_such_module",
    ):
        rest.choose("experts", "brokn", WORKLOAD)


def test_a_plugin_whose_hook_fails_is_reported(install, registry):
    install(
        "sour-experts",
        "from tokenyard import hookimpl\n"
        "@hookimpl\ndef tokenyard_experts():\n    raise OSError('sour')\n",
    )
    (problem,) = [p for p in registry().problems if p.distribution == "sour-experts"]
    assert (
        problem.reason == "sour-experts 1.0 failed in its hook tokenyard_experts: OSError('sour')"
    )


def test_a_backend_whose_check_fails_is_unusable(install, registry):
    install(
        "shaky-experts",
        "from tokenyard import Backend, hookimpl\n@hookimpl\ndef tokenyard_experts():\n"
        "    return [Backend('shaky', 'x:Y', priority=3, unusable=lambda w: 1 / 0)]\n",
    )
    chosen = registry().choose("experts", "auto", WORKLOAD)
    assert chosen.passed_over == {
        "shaky": "its own check failed: ZeroDivisionError('division by zero')"
    }


def test_a_router_of_another_algorithm_is_not_passed_over(registry):
    """It is no candidate, so `check` and the log do not name it."""
    chosen = registry().choose("router", "auto", WORKLOAD)
    assert chosen.backend.name == "torch"
    assert "expert_choice" not in chosen.passed_over


def test_a_plugin_for_another_core_is_not_imported(install, registry):
    install("old-experts", "raise SystemExit('imported')", requires="tokenyard-core<0.1")
    (problem,) = [p for p in registry().problems if p.distribution == "old-experts"]
    assert problem.reason.startswith(
        f"old-experts 1.0 was written for tokenyard-core <0.1, but {__version__} is installed; "
    )


def test_two_plugins_with_one_backend_name_are_both_named(offer, registry):
    offer("fast-experts", "fast", priority=99)
    offer("quick-experts", "fast", priority=99)
    rest = registry()
    assert rest.choose("experts", "auto", WORKLOAD).backend.name == "cpu"
    with pytest.raises(
        BackendError,
        match=r"'fast' is offered by both (fast|quick)-experts 1.0 and (fast|quick)-experts 1.0",
    ):
        rest.choose("experts", "fast", WORKLOAD)


def test_a_plugin_that_offers_a_name_of_core_costs_only_itself(offer, registry):
    offer("rude-experts", "torch", priority=99)
    rest = registry()
    (kept,) = [o for o in rest.offers("experts") if o.backend.name == "torch"]
    assert kept.distribution == "tokenyard-core"
    (problem,) = [p for p in rest.problems if "'torch' is offered by both" in p.reason]
    assert "rude-experts 1.0" in problem.reason


HOOK = """
from tokenyard import Backend, hookimpl

class Odd(BaseException):
    pass

def odd(*args):
    raise Odd

class Silent:
    __repr__ = __str__ = odd

@hookimpl
def tokenyard_experts():
    return {offered}
"""

BROKEN = {
    "import": "class Odd(BaseException): pass\nraise Odd('at import')",
    "exit at import": "raise SystemExit(0)",
    "text": HOOK.format(offered="['a']"),
    "nothing": HOOK.format(offered="None"),
    "number": HOOK.format(offered="5"),
    "name": HOOK.format(offered="[Backend(5, 'os:path')]"),
    "path": HOOK.format(offered="[Backend('odd', None)]"),
    "priority": HOOK.format(offered="[Backend('odd', 'os:path', 'high')]"),
    "unusable": HOOK.format(offered="[Backend('odd', 'os:path', 99, 'no')]"),
    "check": HOOK.format(offered="[Backend('odd', 'os:path', 99, odd)]"),
    "check of a number": HOOK.format(offered="[Backend('odd', 'os:path', 99, lambda w: 5)]"),
    "hook": HOOK.format(offered="odd()"),
    "class": HOOK.format(offered="[Backend('odd', 'os:Missing', 99)]"),
    "module": HOOK.format(offered="[Backend('odd', 'no_such_module:A', 99)]"),
    "replaced module": "import sys\nsys.modules[__name__] = None",
    "no text": HOOK.format(offered="[Silent()]"),
    "path without text": HOOK.format(offered="[Backend('odd', Silent())]"),
    "check without text": HOOK.format(offered="[Backend('odd', 'os:path', 9, lambda w: Silent())]"),
    "auto": HOOK.format(offered="[Backend('auto', 'os:path', 99)]"),
    "empty name": HOOK.format(offered="[Backend('', 'os:path', 99)]"),
    "name of lines": HOOK.format(offered="[Backend('odd\\nname', 'os:path', 99)]"),
    "no class": HOOK.format(offered="[Backend('odd', 'sys:exit', 99)]"),
    "another class": HOOK.format(offered="[Backend('odd', 'builtins:int', 99)]"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_costs_only_itself(kind, install, registry):
    install("odd-experts", BROKEN[kind])
    rest = registry()
    chosen = rest.choose("experts", "auto", WORKLOAD)
    assert chosen.backend.name == "cpu"
    table = render(rest, WORKLOAD)
    assert "odd" in table or kind == "nothing"
    usable = [line for line in table.splitlines() if "odd-experts" in line and "  usable" in line]
    # The table does not import the class, so it cannot see what it lacks.
    assert not usable or kind in ("no class", "another class")


def test_two_plugins_with_one_entry_name_both_count(offer, registry):
    offer("fast-experts", "fast", entry="same")
    offer("quick-experts", "quick", entry="same")
    assert {"fast", "quick"} <= {o.backend.name for o in registry().offers("experts")}


def test_a_missing_class_is_named(install, registry):
    install(
        "hollow-experts",
        "from tokenyard import Backend, hookimpl\n"
        "@hookimpl\ndef tokenyard_experts():\n    return [Backend('hollow', 'os:Missing')]\n",
    )
    with pytest.raises(BackendError, match=r"backend 'hollow' could not be loaded from os:Missing"):
        registry().choose("experts", "hollow", WORKLOAD).construct(WORKLOAD, None)


def test_an_unknown_variable_is_named_once(monkeypatch, caplog):
    _choose._warn_of_unknown_variables.cache_clear()
    monkeypatch.setenv("TOKENYARD_EXPERT", "loop")
    for _ in range(2):
        _choose.overridden("experts")
    assert [record.getMessage() for record in caplog.records] == [
        "the environment variable TOKENYARD_EXPERT is not known and has no effect "
        "(did you mean 'TOKENYARD_EXPERTS'?)"
    ]
    _choose._warn_of_unknown_variables.cache_clear()
