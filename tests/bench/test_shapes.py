"""The values of `--shape`."""

import pytest

from tokenyard import ConfigError
from tokenyard_bench.shapes import SHAPES, parse_shape, parse_shapes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "dbrxx",
            r"--shape 'dbrxx' is unknown \(did you mean 'dbrx'\?\); "
            r"give T,D,F,E,K or one of: mixtral, dbrx",
        ),
        ("1,2,3", r"--shape '1,2,3' is not five whole numbers T,D,F,E,K"),
        ("8,8,a,8,2", r"is not five whole numbers"),
        ("0,8,8,8,2", r"has T = 0; it must be at least 1"),
    ],
)
def test_a_bad_shape_is_one_sentence(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_shape(text)


def test_all_shapes_are_those_of_the_machine():
    assert [shape.name for shape in parse_shapes(["all", "dbrx"], gpu=True)] == [
        n for n in SHAPES if n != "cpu"
    ]
    assert [shape.name for shape in parse_shapes(["all"], gpu=False)] == ["cpu"]


def test_tokens_replace_those_of_every_shape():
    shapes = parse_shapes(["cpu", "64,8,8,8,2"], gpu=False, tokens=[1, 8, 8])
    assert [(shape.name, shape.tokens) for shape in shapes] == [
        ("cpu", 1),
        ("cpu", 8),
        ("64,8,8,8,2", 1),
        ("64,8,8,8,2", 8),
    ]
