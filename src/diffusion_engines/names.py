"""Names of inputs and outputs: ``input_0``, ``output_10``; their numbers are their order."""

from __future__ import annotations


def trailing_number(name: str) -> int:
    """Return 10 of ``input_10``: sorted as text, it would stand before ``input_2``."""
    return int(name.rpartition("_")[2])
