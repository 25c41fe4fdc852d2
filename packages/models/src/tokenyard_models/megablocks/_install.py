"""Make ``import megablocks`` find tokenyard's layers."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from tokenyard import ConfigError

_PACKAGE = "tokenyard_models.megablocks"
_MODULES = (
    "grouped_gemm_util",
    "layers",
    "layers.arguments",
    "layers.common",
    "layers.dmlp_registry",
    "layers.dmoe",
    "layers.glu",
    "layers.mlp",
    "layers.moe",
    "layers.mpu",
    "layers.router",
)


def install() -> None:
    """Let ``import megablocks`` and its modules find this package, in this process.

    Raises ConfigError if MegaBlocks itself is installed.
    """
    present = sys.modules.get("megablocks")
    if present is not None and present.__name__ == _PACKAGE:
        return
    if present is not None or importlib.util.find_spec("megablocks") is not None:
        raise ConfigError(
            "MegaBlocks is installed, and its name cannot mean two packages; uninstall it, or run "
            "the script without tokenyard_models.megablocks"
        )
    sys.modules["megablocks"] = importlib.import_module(_PACKAGE)
    for name in _MODULES:
        sys.modules[f"megablocks.{name}"] = importlib.import_module(f"{_PACKAGE}.{name}")
