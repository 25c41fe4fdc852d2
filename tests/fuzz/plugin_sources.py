"""Sources of plugins that are broken in one way."""

from __future__ import annotations

import random
from pathlib import Path

_HEAD = """
from tokenyard import Backend, hookimpl

class Odd(BaseException):
    pass

class Sour:
    def __repr__(self):
        raise Odd("repr")
    __str__ = __iter__ = __len__ = __eq__ = __bool__ = __getattr__ = __repr__
    __hash__ = object.__hash__

def odd(*args, **kwargs):
    raise {error}
"""
_ERRORS = (
    *("Odd('x')", "SystemExit(0)", "SystemExit('bye')", "ValueError", "OSError(28, 'full')", "Odd"),
    *(
        "MemoryError()",
        "RecursionError()",
        "StopIteration()",
        "GeneratorExit()",
        "ImportError('x')",
    ),
    *("UnicodeDecodeError('utf-8', b'', 0, 1, 'x')", "type('E', (Exception,), {'__str__': odd})()"),
)
_AT_IMPORT = (
    *(
        "odd()",
        "def (",
        "import no_such_module",
        "print('x' * 100000)",
        "from tokenyard import nope",
    ),
    *("raise SystemExit", "def f(): f()\nf()", "1 / 0", "import sys\nsys.exit(3)", "assert False"),
    *("hookimpl = 5", "import sys\nsys.modules[__name__] = None", "\x00", "__getattr__ = odd"),
    *("import warnings\nwarnings.warn('x')", "import time\ntime.sleep(0.2)", "del Backend"),
)
_HOOKS = ("routers", "permutations", "experts", "exchanges", "strategies", "models", "nothing")
_NAMES = (
    *(
        "'odd'",
        "'torch'",
        "'auto'",
        "''",
        "5",
        "None",
        "'[red]'",
        "'a\\nb'",
        "'x' * 3000",
        "Sour()",
    ),
    *("'single'", "'local'", "'dbrx'", "('odd',)", "b'odd'"),
)
_PATHS = (
    *("'os:path'", "'os:Missing'", "'no_such:A'", "''", "':'", "'a:b:c'", "None", "'os'", "Sour()"),
    *("'builtins:int'", "'builtins:exit'", "'builtins:dict'", "'json:loads'", "'.x:A'", "'os:sep'"),
    *("'sys:exit'", "__name__ + ':Sour'", "__name__ + ':odd'", "'x' * 5000"),
)
_PRIORITIES = (
    "99",
    "0",
    "-1",
    "10**100",
    "True",
    "None",
    "'high'",
    "float('nan')",
    "1.5",
    "Sour()",
)
_UNUSABLE = (
    *("odd", "lambda w: None", "lambda w: 5", "lambda w: Sour()", "'no'", "None", "lambda: None"),
    *("lambda w: ''", "lambda w: '[red]\\n'", "lambda w: False", "lambda w: w.nothing", "Sour()"),
)
_OFFERED = (
    *(
        "None",
        "5",
        "'abc'",
        "[None]",
        "['a']",
        "{}",
        "[[]]",
        "Sour()",
        "[Sour()]",
        "odd()",
        "Backend",
    ),
    *(
        "[Backend]",
        "iter([5])",
        "(odd() for _ in [1])",
        "[object()]",
        "b'a'",
        "{'a': 5}",
        "hookimpl",
    ),
)


def draw_source(draw: random.Random) -> str:
    """Return the source of a plugin's module."""
    head = _HEAD.replace("{error}", draw.choice(_ERRORS))
    kind = draw.random()
    if kind < 0.25:
        return head + draw.choice(_AT_IMPORT) + "\n"
    hook = draw.choice(_HOOKS)
    arguments = draw.choice(("", "", "", "x", "self", "*args", "x=5"))
    offered = draw.choice(_OFFERED)
    if kind > 0.45:
        fields = [draw.choice(each) for each in (_NAMES, _PATHS, _PRIORITIES, _UNUSABLE)]
        if draw.random() < 0.6:  # so that `auto` tries it
            fields[0], fields[2], fields[3] = "'odd'", "99", "lambda w: None"
        offered = f"[Backend({', '.join(fields)})]"
    decorator = draw.choice(
        ("@hookimpl",) * 8 + ("@hookimpl(tryfirst=5)", "@hookimpl(wrapper=True)")
    )
    return f"{head}\n{decorator}\ndef tokenyard_{hook}({arguments}):\n    return {offered}\n"


def install(site: Path, source: str) -> None:
    """Write a plugin with its metadata into a folder, which is searched for modules."""
    info = site / "odd-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "odd_plugin.py").write_text(source)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\nRequires-Dist: tokenyard-core\n"
    )
    (info / "entry_points.txt").write_text("[tokenyard]\nplugin = odd_plugin\n")
