"""Name a key of a source as the user gave it: in a config, to `data pack` or to `eval`."""

from __future__ import annotations

SOURCE = "SOURCE"
"""The key of the sources of `data pack`."""

_ARGUMENTS = {
    "path": SOURCE,
    "local": f"--mds {SOURCE}",
    "hf_name": f"--hf {SOURCE}",
    "split": "--split",
    "delta": f"--delta {SOURCE}",
    "version": "--table-version",
}


def key_below(key: str, name: str) -> str:
    """Return the config key `name` of a source; of a command, the argument that it is from."""
    if key.startswith("--"):
        return key
    return _ARGUMENTS[name] if key == SOURCE else f"{key}.{name}"
