"""The weights of a bundle whose plan has none: the graph that they were exported to."""

from __future__ import annotations

from pathlib import Path

from diffusion_engines import manifests
from diffusion_engines.backends.base import GRAPH_FILES
from diffusion_engines.errors import BuildError
from diffusion_engines.files import copy_files
from diffusion_engines.manifests import Engine

GRAPH = GRAPH_FILES["onnx"]


def add_weights(folder: Path, manifest: Engine, graph: Path) -> None:
    """Copy a graph with its weights beside a plan that was built from its structure.

    Args:
        folder: of the bundle.
        manifest: of the engine.
        graph: the folder of the graph.

    Raises:
        IntegrityError: the graph is damaged.
        BuildError: the plan is of another structure: TensorRT takes weights by their names alone.
    """
    found = manifests.read(graph, manifests.Graph)
    built, given = manifest.onnx.files[GRAPH].sha256, found.files[GRAPH].sha256
    if built != given:
        raise BuildError(
            f"the weights of {graph} do not fit the engine {manifest.name}",
            expected=f"a graph of the structure that it was built from, {built[:12]}",
            found=given[:12],
            fix="build the engine again: `dvc repro`",
        )
    copy_files(graph, folder)
