"""Checks that take the toy network through a builder, a runtime and a wrap."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from diffusion_engines import manifests
from diffusion_engines.backends import backend, gpus
from diffusion_engines.backends.base import GRAPH_FILES, BuildResult, Graph, Target
from diffusion_engines.backends.nvidia.building import recording_logger
from diffusion_engines.backends.nvidia.refitting import refit
from diffusion_engines.backends.nvidia.settings import Wrap
from diffusion_engines.backends.nvidia.wrapping import KEYS
from diffusion_engines.backends.nvidia.wrapping.weights import GRAPH
from diffusion_engines.backends.tensorrt.building import build_with
from diffusion_engines.backends.tensorrt.building.layers import LAYERS
from diffusion_engines.backends.tensorrt.building.trtexec import find_trtexec, format_version
from diffusion_engines.backends.tensorrt.building.versions import builder_version, library
from diffusion_engines.backends.tensorrt.settings import TensorRTTarget
from diffusion_engines.backends.tensorrt_rtx import building as rtx
from diffusion_engines.backends.tensorrt_rtx.settings import RTX_CAPABILITIES, TensorRTRTXTarget
from diffusion_engines.doctor import toy
from diffusion_engines.doctor.findings import Finding, missing, passed
from diffusion_engines.doctor.targets import cpu_target, rtx_target, tensorrt_target
from diffusion_engines.files import copy_files, new_folder
from diffusion_engines.runtime.bundle import (
    load_bundle,
    load_exported_program,
    load_torchscript,
    wrap_engine,
)

# Of a stripped plan, a bundle with the weights of each fine-tune.
ENGINE, BUNDLE, TUNED = "engine", "bundle", "bundle-tuned"
_FIRST_LAYERS = 3
T = TypeVar("T", TensorRTTarget, TensorRTRTXTarget)


def check_export(folder: Path) -> Finding:
    """Export the toy network."""
    manifest = toy.export(folder)
    return passed(f"ONNX opset {manifest.opset}, {manifest.precision}", versions=manifest.versions)


def check_onnxruntime(folder: Path) -> Finding:
    """Build the network with ONNX Runtime for the CPU and run it."""
    _build(folder, "cpu", cpu_target(folder))
    worst = toy.compare(load_bundle(folder / "cpu" / BUNDLE, "cpu"), "cpu")
    return passed(f"relative L2 {worst:.1e} to PyTorch's fp32", rel_l2=worst)


def check_rtx_build(folder: Path) -> Finding:
    """Build the network with TensorRT-RTX."""
    target = rtx_target(folder)
    found = _build(folder, "rtx", target)
    return replace(found, detail=f"{found.detail}, for {', '.join(target.compute_capabilities)}")


def check_rtx_stripped(folder: Path) -> Finding:
    """Build the network without its weights with TensorRT-RTX."""
    return _build(folder, "rtx_stripped", _stripped(rtx_target(folder)))


def check_rtx_refit(folder: Path) -> Finding:
    """Run that engine with the weights of two fine-tunes in turn."""
    gpu = gpus.any_gpu()
    if gpu.capability not in RTX_CAPABILITIES:
        return missing(f"TensorRT-RTX does not run on {gpu}")
    return _refit(folder / "rtx_stripped", rtx.library())


def check_rtx_run(folder: Path) -> Finding:
    """Run the engine of TensorRT-RTX."""
    gpu = gpus.any_gpu()
    if gpu.capability not in RTX_CAPABILITIES:
        return missing(f"TensorRT-RTX does not run on {gpu}")
    return _run(folder / "rtx" / BUNDLE)


def check_trtexec_build(folder: Path) -> Finding:
    """Build the network with trtexec and read the layers that it wrote."""
    found = find_trtexec()
    return _build_tensorrt(
        folder, "trtexec", lambda graph, to, target: build_with(found, graph, to, target)
    )


def check_python_build(folder: Path) -> Finding:
    """Build the network with TensorRT's Python API, and read the engine's layers."""
    return _build_tensorrt(
        folder,
        "python",
        lambda graph, to, target: build_with(None, graph, to, target),
        tensorrt=format_version(builder_version(None)),
    )


def check_tensorrt_stripped(folder: Path) -> Finding:
    """Build the network without its weights with TensorRT, by trtexec where it is there."""
    target = _stripped(tensorrt_target(folder))
    return _build(folder, "stripped", target)


def check_tensorrt_refit(folder: Path) -> Finding:
    """Run that engine with the weights of two fine-tunes in turn."""
    return _refit(folder / "stripped", library())


def run_check(name: str) -> Callable[[Path], Finding]:
    """Return the check that runs the engine of a builder."""
    return lambda folder: _run(folder / name / BUNDLE)


def wrap_check(name: str, kind: Wrap) -> Callable[[Path], Finding]:
    """Return the check that wraps the engine of a builder for PyTorch, at its usual sizes."""

    def check(folder: Path) -> Finding:
        engine = folder / name / ENGINE
        manifest = manifests.read(engine, manifests.Engine)
        with new_folder(folder / name / f"{ENGINE}-{kind}") as copy:
            copy_files(engine, copy)
            manifests.write(copy, replace(manifest, settings={**manifest.settings, "wrap": [kind]}))
        with new_folder(folder / name / kind) as bundle:
            wrap_engine(folder / name / f"{ENGINE}-{kind}", bundle)
        made = manifests.read(folder / name / kind, manifests.Bundle)
        file = made.torchscript[KEYS[kind]]
        return passed(f"{file}, {made.files[file].bytes / 1e6:.1f} MB", **made.torchscript)

    return check


def wrapped_check(name: str, kind: Wrap) -> Callable[[Path], Finding]:
    """Return the check that loads the file for PyTorch of a builder's engine and runs it."""
    load = {"torchscript": load_torchscript, "exported_program": load_exported_program}[kind]

    def check(folder: Path) -> Finding:
        worst = toy.compare(load(folder / name / kind), "cuda")
        return passed(f"relative L2 {worst:.1e} to PyTorch's fp32", rel_l2=worst)

    return check


def _build_tensorrt(
    folder: Path, name: str, build: Callable[[Graph, Path, Any], BuildResult], **fingerprint: str
) -> Finding:
    target = tensorrt_target(folder)
    found = _build(folder, name, target, lambda graph, to: build(graph, to, target), fingerprint)
    layers = json.loads((folder / name / ENGINE / LAYERS).read_text())["Layers"]
    return replace(found, facts={**found.facts, "first_layers": layers[:_FIRST_LAYERS]})


def _build(
    folder: Path,
    name: str,
    target: Target,
    build: Callable[[Graph, Path], BuildResult] | None = None,
    fingerprint: Mapping[str, object] | None = None,
) -> Finding:
    """Build and bundle, as the stages `build` and `wrap` do."""
    module = backend(target.backend)
    stripped = module.builds_without_weights(target)
    source = folder / (toy.STRUCTURE if stripped else toy.GRAPHS[0])
    manifest = manifests.read(source, manifests.Structure if stripped else manifests.Graph)
    graph = Graph(
        manifest.name,
        manifest.component,
        manifest.precision,
        module.graph_format,
        source / GRAPH_FILES[module.graph_format],
        manifest.inputs,
    )
    with new_folder(folder / name / ENGINE) as engine:
        result = build(graph, engine) if build else module.build(graph, engine, target)
        (folder / name / "build.log").write_text(result.log + "\n")
        built = manifests.engine_from_graph(
            manifest,
            name=f"{name}-{toy.COMPONENT}",
            target=name,
            backend=target.backend,
            builder=result.builder,
            settings=asdict(target),
            fingerprint={**module.fingerprint(target), **(fingerprint or {})},
            engine=result.engine,
            layers=result.layers,
            dtypes=result.precisions,
        )
        manifests.write(engine, built)
    for tune, bundle in enumerate([BUNDLE, TUNED] if stripped else [BUNDLE]):
        with new_folder(folder / name / bundle) as wrapped:
            wrap_engine(folder / name / ENGINE, wrapped, graph=folder / toy.GRAPHS[tune])
    return passed(
        result.builder,
        fingerprint=dict(built.fingerprint),
        layers=dict(result.layers),
        precisions=dict(result.precisions),
    )


def _stripped(target: T) -> T:
    return replace(target, build=replace(target.build, weights="stripped"))


def _refit(folder: Path, trt: Any) -> Finding:
    """Load a plan with the weights of one bundle; give it those of the other, and back."""
    bundles = [folder / BUNDLE, folder / TUNED]
    loaded = load_bundle(bundles[0], "cuda")
    logger = recording_logger(trt)

    def give(tune: int) -> None:
        refit(trt, loaded.manifest, bundles[tune] / GRAPH, loaded.engine.engine, logger)

    worst = toy.compare_fine_tunes(loaded, give, "cuda")
    told = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return passed(f"the same numbers after a refit; relative L2: {told}", **worst)


def _run(bundle: Path) -> Finding:
    """Run a bundle on the GPU, with and without CUDA graphs."""
    worst = {
        name: toy.compare(load_bundle(bundle, "cuda", cuda_graph=cuda_graph), "cuda")
        for name, cuda_graph in (("stream", False), ("cuda_graph", True))
    }
    told = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return passed(f"relative L2 to PyTorch's fp32: {told}", **worst)
