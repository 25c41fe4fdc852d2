"""A kernel file and the macros to compile it with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_FOLDER = files("tokenyard_kernels_cuda") / "kernels"


@dataclass(frozen=True)
class Source:
    """One file in ``kernels/`` with one set of macros."""

    name: str  # for example "moves.cu"
    macros: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """Return the content of the file."""
        return _read(self.name)

    def options(self) -> list[str]:
        """Return the compiler options that define the macros."""
        return [f"-D{name}={value}" for name, value in self.macros]

    def __str__(self) -> str:
        macros = ", ".join(f"{name}={value}" for name, value in self.macros)
        return f"{self.name} ({macros})" if macros else self.name


@cache
def headers() -> dict[str, str]:
    """Return the text of every header that a source can include, by file name."""
    return {file.name: _read(file.name) for file in _FOLDER.iterdir() if file.name.endswith(".cuh")}


@cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
