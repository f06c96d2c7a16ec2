"""Compare a quantized graph, and what it was made from, with the recorded reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.onnx.session import feeds_of, session_of
from diffusion_engines.parity.metrics import Difference, worst_difference
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.recording import Call


@dataclass(frozen=True)
class GraphParity:
    """The distance of a graph and of its source from fp32 PyTorch, by recorded call."""

    source: tuple[Difference, ...]
    graph: tuple[Difference, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per call; ``source_rel_l2`` is that of the source."""
        return [
            {"call": index, "source_rel_l2": one.rel_l2, **asdict(other)}
            for index, (one, other) in enumerate(zip(self.source, self.graph, strict=True))
        ]

    def worst(self) -> dict[str, float]:
        """Return the worst of all calls."""
        return {
            "rel_l2": max(value.rel_l2 for value in self.graph),
            "source_rel_l2": max(value.rel_l2 for value in self.source),
            "not_finite": sum(value.not_finite for value in self.graph),
        }

    def misses(self, allowed: float) -> list[str]:
        """Describe every call whose relative L2 error exceeds ``allowed``."""
        misses = []
        for index, found in enumerate(self.graph):
            if found.not_finite:
                misses.append(f"call {index}: {found.not_finite} values are NaN or infinite")
            elif not found.rel_l2 <= allowed:  # also when it is NaN
                misses.append(f"call {index}: rel_l2 {found.rel_l2:.2e} > {allowed:.2e}")
        return misses


def compare_graphs(
    source: Path, graph: Path, calls: Sequence[Call], *, names: tuple[str, str]
) -> GraphParity:
    """Run two graphs in ONNX Runtime on recorded inputs; ``names`` are for the log.

    Raises:
        ExportError: ONNX Runtime cannot run one of them on this CPU.
    """
    return GraphParity(_differences(source, calls, names[0]), _differences(graph, calls, names[1]))


def _differences(path: Path, calls: Sequence[Call], name: str) -> tuple[Difference, ...]:
    found = []
    with step(f"compare {name} with the reference"):
        session = session_of(path)
        for tensors, expected in progress(calls, name):
            feeds = feeds_of(session.get_inputs(), tensors)
            outputs = session.run([f"output_{i}" for i in range(len(expected))], feeds)
            found.append(
                worst_difference([torch.from_numpy(value).float() for value in outputs], expected)
            )
    return tuple(found)
