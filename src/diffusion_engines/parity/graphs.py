"""Compare a graph, and what it was made from, with the recorded reference in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion_engines.onnx.session import feeds_of, session_of
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.metrics import worst_difference
from diffusion_engines.parity.results import GraphParity
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.calls import Call


def compare_graphs(
    source: Path, graph: Path, calls: Sequence[Call], *, names: tuple[str, str]
) -> GraphParity:
    """Run two graphs in ONNX Runtime on recorded inputs; ``names`` are for the log.

    Raises:
        ExportError: ONNX Runtime cannot run one of them on this CPU.
        IntegrityError: the reference has NaN or infinities.
    """
    return GraphParity(
        graph_differences(source, calls, names[0]), graph_differences(graph, calls, names[1])
    )


def graph_differences(path: Path, calls: Sequence[Call], name: str) -> tuple[Difference, ...]:
    """Run a graph in ONNX Runtime on recorded inputs; return the distance of each call.

    Nothing is run, or loaded, where there is no call.

    Raises:
        ExportError: ONNX Runtime cannot run it on this CPU.
        IntegrityError: the reference has NaN or infinities.
    """
    if not calls:
        return ()
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
