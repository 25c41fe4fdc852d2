"""References between the keys of a config: what they mean, and the bound on their size."""

import time

import pytest

from tokenyard import ConfigError
from tokenyard_train.config.interpolate import interpolate


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("${a.b}", 1),
        ("x${a.b}y${a.text}", "x1ytext"),
        ("${list[1]}", 2),
        ("${list.0}", "text"),
        ("${.here}", "beside"),
        ("${..a.b}", 1),
        ("${a}", {"b": 1, "text": "text", "3": 3}),
        ("${again.text}", "text"),
        ("${a.3}", 3),
        (r"\${a.b}", "${a.b}"),
        ("5 $", "5 $"),
        ("${nothing}", None),
    ],
)
def test_a_reference_is_the_value_at_its_key(value, result):
    config = {
        "a": {"b": 1, "text": "text", 3: 3},
        "list": ["${a.text}", 2],
        "again": "${a}",
        "nothing": None,
        "section": {"here": "beside", "value": value},
    }
    assert interpolate(config, 1000)["section"]["value"] == result


BOMBS = {
    "text": ("x" * 8, "${variables.a%d}${variables.a%d}"),
    "list": (["x"], ["${variables.a%d}", "${variables.a%d}"]),
    "mapping": ({"x": 1}, {"l": "${variables.a%d}", "r": "${variables.a%d}"}),
}


def _fill(value, number):
    if isinstance(value, str):
        return value.replace("%d", str(number))
    if isinstance(value, list):
        return [_fill(item, number) for item in value]
    return {key: _fill(item, number) for key, item in value.items()}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_at_once(kind):
    first, pattern = BOMBS[kind]
    variables = {"a0": first} | {f"a{i}": _fill(pattern, i - 1) for i in range(1, 40)}
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"variables\.a\d+ has more than 1,048,576 characters"):
        interpolate({"variables": variables}, 1 << 20)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("${oc.env:HOME}", "the resolver oc.env is not supported, so that no secret"),
        ("${oc.decode:${b}}", "inside another"),
        ("x ${oc.select: b}", "the resolver oc.select is not supported"),
        ("${a}", "a refers to itself"),
        ("${c}", "refers to itself"),
        ("${}", "refers to itself"),
        ("${b.c.d}", "Interpolation key 'b.c.d' not found"),
        ("${b[7]}", r"Interpolation key 'b\[7\]' not found"),
        ("${b${d}}", "inside another or without its end"),
        ("${b", "inside another or without its end"),
        ("x ${s}", "is a section"),
        ("a\0b", "NUL"),
    ],
)
def test_references_without_a_value_are_refused(value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        interpolate({"a": value, "b": "text", "c": "${a}", "d": 1, "s": {"x": 1}}, 1000)
