import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenyard import Registry
from tokenyard.registry import installed_plugins

BACKEND = """
from tokenyard import Backend, hookimpl

@hookimpl
def tokenyard_experts():
    path = "tokenyard.experts:TorchExperts"
    return [Backend({name!r}, path, {priority}, lambda workload: {reason!r})]
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Write a plugin distribution onto the import path: module, metadata and entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(
        distribution: str, source: str, requires: str = "tokenyard-core", entry: str = "plugin"
    ) -> None:
        module = distribution.replace("-", "_") + "_plugin"
        monkeypatch.delitem(sys.modules, module, raising=False)  # of an earlier test
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\n"
            f"Name: {distribution}\nVersion: 1.0\nRequires-Dist: {requires}\n"
        )
        (info / "entry_points.txt").write_text(f"[tokenyard]\n{entry} = {module}\n")

    return install


@pytest.fixture
def offer(install: Install) -> Install:
    """Install a plugin that offers one expert kernel."""

    def offer(
        distribution: str, name: str, priority: int = 1, reason: str | None = None, **kwargs: str
    ) -> None:
        install(distribution, BACKEND.format(name=name, priority=priority, reason=reason), **kwargs)

    return offer


@pytest.fixture
def registry() -> Callable[[], Registry]:
    """Discover plugins again, as a new process would."""
    return lambda: Registry(*installed_plugins())
