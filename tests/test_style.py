"""Functions are short with few parameters, lines have one statement, and kernels have comments."""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
SOURCES = sorted(PACKAGES.glob("*/src/**/*.py"))
KERNELS = PACKAGES / "kernels-triton" / "src" / "tokenyard_kernels_triton" / "kernels"
MOST_LINES = 40
MOST_PARAMETERS = 8


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_operator(function: ast.FunctionDef) -> bool:
    """Return whether torch registers the function as an operator. Its signature is the schema."""
    return any("operator" in ast.unparse(d) for d in function.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_functions_are_short_and_take_few_parameters():
    """Kernels and operators are exempt: their signatures are flat lists of tensors."""
    too_large = [
        f"{path.name}: {function.name}"
        for path in SOURCES
        if KERNELS not in path.parents
        for function in functions(path)
        if function.end_lineno - function.lineno >= MOST_LINES
        or (parameters(function) > MOST_PARAMETERS and not is_operator(function))
    ]
    assert not too_large


def test_conditional_expressions_are_not_nested():
    nested = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.IfExp)
        and any(isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse))
    ]
    assert not nested


@pytest.mark.parametrize("package", sorted(p.name for p in PACKAGES.iterdir() if p.is_dir()))
def test_one_statement_a_line(package):
    """At most 3 assignments of a tuple to a tuple in 1,000 lines."""
    lines = 0
    parallel = 0
    for path in sorted((PACKAGES / package / "src").rglob("*.py")):
        text = path.read_text()
        lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                parallel += any(isinstance(target, ast.Tuple) for target in node.targets)
    assert 1000 * parallel <= 3 * lines


def test_kernels_are_commented():
    """At least 6 comments in 100 lines."""
    lines = 0
    comments = 0
    for path in KERNELS.glob("*.py"):
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        lines += path.read_text().count("\n")
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
    assert 100 * comments >= 6 * lines
