"""What a graph consists of before and after simplification: the type, written and read here.

No ONNX in here: the report reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_engines.results import read_result, write_result

# Raise it when a field of a result changes.
_VERSION = 1


@dataclass(frozen=True)
class GraphStatistics:
    """What one graph consists of.

    ``macs`` are the multiply-accumulates of Conv, Gemm and MatMul in one call; None where a shape
    is open. ``bytes`` count the graph file and its external data.
    """

    operators: Mapping[str, int]
    nodes: int
    bytes: int
    macs: int | None


@dataclass(frozen=True)
class Simplification:
    """A graph as it was exported, and as it was simplified."""

    before: GraphStatistics
    after: GraphStatistics

    def rows(self) -> list[tuple[str, int, int]]:
        """Return operator, count before, count after; the most frequent ones first."""
        before, after = self.before.operators, self.after.operators
        return sorted(
            ((name, before.get(name, 0), after.get(name, 0)) for name in {*before, *after}),
            key=lambda row: (-row[2], -row[1], row[0]),
        )


def write_simplification(result: Simplification, folder: Path) -> None:
    """Write ``operators.json`` into ``folder``."""
    write_result(folder / "operators.json", result, version=_VERSION)


def read_simplification(folder: Path) -> Simplification:
    """Read what :func:`write_simplification` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(
        folder / "operators.json",
        Simplification,
        version=_VERSION,
        stage=f"simplify@{folder.name}",
    )
