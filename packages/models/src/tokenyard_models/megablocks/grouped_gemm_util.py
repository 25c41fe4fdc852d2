"""Whether grouped matmuls are available, as MegaBlocks reports it. Here they always are."""

from __future__ import annotations


def grouped_gemm_is_available() -> bool:
    """Return True."""
    return True


def assert_grouped_gemm_is_available() -> None:
    """Do nothing."""
