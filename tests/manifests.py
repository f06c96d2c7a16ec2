"""Manifests as the stages write them, where a test needs few of their fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from diffusion_engines import manifests
from diffusion_engines.backends import backend, base
from diffusion_engines.families.base import OutputSpec, TensorSpec
from diffusion_engines.manifests import Bundle, Engine, Graph, Weights


def weights_manifest(**changes: Any) -> Weights:
    """Return the manifest of a folder of a synthetic model called ``tiny``."""
    plain = Weights("tiny", "synthetic", None, None, synthetic=True, seed=0)
    return replace(plain, **changes)


def graph_manifest(
    component: str = "unet",
    precision: str = "fp32",
    inputs: Sequence[TensorSpec] = (),
    *,
    weights: Weights | None = None,
    **changes: Any,
) -> Graph:
    """Return the manifest of a graph; that of ``weights`` where they are given."""
    plain = manifests.graph_from_weights(
        weights or weights_manifest(),
        name=f"{component}-{precision}",
        component=component,
        precision=precision,
        inputs=inputs,
        outputs=(OutputSpec("output_0", "noise"),),
        guidance=True,
        exporter="dynamo",
        opset=18,
        patches=(),
        versions={"torch": "2.13.0"},
    )
    return replace(plain, **{"compared": True, **changes})


def engine_manifest(
    name: str = "cpu-unet", graph: Graph | None = None, **changes: Any
) -> manifests.Engine:
    """Return the manifest of an engine that nothing has built."""
    plain = manifests.engine_from_graph(
        graph or graph_manifest(),
        name=name,
        target=name.split("-", maxsplit=1)[0],
        backend="onnxruntime",
        builder="onnxruntime 1.32.0",
        settings={},
        fingerprint={},
        engine="engine.onnx",
        layers={"Conv": 3},
        dtypes={"fp32": 7},
    )
    return replace(plain, **changes)


def built_manifest(
    name: str, graph: Graph, target: base.Target, result: base.BuildResult
) -> Engine:
    """Return the manifest of an engine that was built here, as the stage `build` does."""
    return manifests.engine_from_graph(
        graph,
        name=name,
        target=name.split("-", maxsplit=1)[0],
        backend=target.backend,
        builder=result.builder,
        settings=asdict(target),
        fingerprint=backend(target.backend).fingerprint(target),
        engine=result.engine,
        layers=result.layers,
        dtypes=result.precisions,
    )


def bundle_manifest(name: str = "cpu-unet", **changes: Any) -> Bundle:
    """Return the manifest of a bundle that nothing has built, without TorchScript."""
    return replace(manifests.bundle_from_engine(engine_manifest(name), {}), **changes)
