"""Read what the other stages left in artifacts/ into plain data.

Only what the current config names is read: folders of other targets may lie beside it. What a
target's measurements are missing is None; what every fleet has (engines, operator tables, the
reference) must be there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines import config, manifests
from diffusion_engines.bench.results import Benchmark, read_benchmark
from diffusion_engines.files import read_json
from diffusion_engines.layout import Workspace
from diffusion_engines.onnx.statistics import Simplification, read_simplification
from diffusion_engines.parity.distances import worst_of
from diffusion_engines.parity.results import (
    GraphCheck,
    ImageParity,
    Quantization,
    Validation,
    read_graph_check,
    read_quantization,
    read_validation,
)
from diffusion_engines.release.chosen import Chosen, read_chosen
from diffusion_engines.report.prices import price_of


@dataclass(frozen=True)
class Step:
    """One named step of one run of a stage: wall time in seconds, peak resident memory in bytes."""

    item: str
    name: str
    seconds: float
    peak_memory: float


@dataclass(frozen=True)
class StageLog:
    """All steps of a stage, over the items that it ran for."""

    name: str
    items: int
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Wall time of all steps together."""
        return sum(step.seconds for step in self.steps)

    @property
    def peak_memory(self) -> float:
        """The largest peak, in bytes."""
        return max(step.peak_memory for step in self.steps)


@dataclass(frozen=True)
class Engine:
    """A built engine: its manifest, and what the build took (seconds, bytes)."""

    name: str
    target: str
    component: str
    precision: str
    graph: str
    manifest: manifests.Engine
    build_seconds: float
    build_memory: float

    @property
    def builder(self) -> str:
        """The backend and its version."""
        return self.manifest.builder

    @property
    def bytes(self) -> int:
        """The engine's files together, without the manifest."""
        return sum(file.bytes for file in self.manifest.files.values())


@dataclass(frozen=True)
class GeneratedImage:
    """An image of a prompt of the config, and how it came about; None: no animation was made."""

    prompt: str
    seed: int
    path: Path
    animation: Path | None


@dataclass(frozen=True)
class Generated:
    """What the engines of a target painted (``stages/generate.py``)."""

    settings: Mapping[str, Any]
    images: tuple[GeneratedImage, ...]


@dataclass(frozen=True)
class Reference:
    """The recorded fp32 PyTorch pipeline: its settings and the pictures that it wrote."""

    sampling: Mapping[str, Any]
    prompts: tuple[str, ...]
    seed: int
    batches: int
    images: tuple[Path, ...]
    frames: tuple[Path, ...]
    frame_steps: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Everything that the page, the figures and the summary are made of."""

    workspace: Workspace
    model: config.Model
    image: config.Image
    engines: tuple[Engine, ...]
    measure: tuple[str, ...]
    validations: Mapping[str, Validation]
    benchmarks: Mapping[str, Benchmark]
    chosen: tuple[Chosen, ...]
    generated: Mapping[str, Generated]
    operators: Mapping[str, Simplification]
    graph_checks: Mapping[str, GraphCheck]
    quantizations: tuple[Quantization, ...]
    reference: Reference
    stages: tuple[StageLog, ...]
    prices: Mapping[str, tuple[str, config.Price]]

    @property
    def synthetic(self) -> bool:
        """Whether the weights are random numbers."""
        made_from = (engine.manifest.synthetic for engine in self.engines)
        return self.model.source == "synthetic" or any(made_from)

    @property
    def loras(self) -> Mapping[str, Sequence[manifests.FusedLora]]:
        """What was fused into the weights, by the components that it changed."""
        return {e.component: e.manifest.loras for e in self.engines if e.manifest.loras}

    def graph_error(self, graph: str) -> float | None:
        """The worst relative L2 of a graph in ONNX Runtime, None where that cannot run it."""
        for found in self.quantizations:
            if graph == found.name:
                return worst_of(found.parity.graph).rel_l2
        worst = self.graph_checks[graph].worst if graph in self.graph_checks else None
        return worst.rel_l2 if worst else None

    def picture(self, target: str, image: ImageParity) -> Path:
        """The file of an image that the engines of a target made in `validate`."""
        return self.workspace.validation(target) / image.file


def collect(
    workspace: Workspace,
    model: config.Model,
    image: config.Image,
    graphs: Mapping[str, config.Graph],
    engines: Mapping[str, config.Engine],
    measured: Sequence[str],
    alternatives: Sequence[str] = (),
    prices: Mapping[str, config.Price] | None = None,
) -> Report:
    """Read a workspace's artifacts/ in the order of the config.

    Raises:
        IntegrityError: an engine, an operator table or the reference is missing or damaged, or a
            measurement has another format than this version writes.
    """
    exports = [name for name, graph in graphs.items() if graph.source is None]
    quantized = [name for name, graph in graphs.items() if graph.source is not None]
    benchmarks = {
        target: read_benchmark(folder)
        for target in measured
        if (folder := workspace.benchmark(target)).is_dir()
    }
    return Report(
        workspace=workspace,
        model=model,
        image=image,
        engines=tuple(_engine(workspace, name, engine) for name, engine in engines.items()),
        measure=tuple(measured),
        validations={
            target: read_validation(folder)
            for target in measured
            if (folder := workspace.validation(target)).is_dir()
        },
        benchmarks=benchmarks,
        chosen=tuple(read_chosen(workspace.alternatives(target)) for target in alternatives),
        generated={
            target: _generated(folder)
            for target in measured
            if (folder := workspace.images(target)).is_dir()
        },
        operators={name: read_simplification(workspace.operators(name)) for name in exports},
        graph_checks={name: read_graph_check(workspace.parity(name)) for name in exports},
        quantizations=tuple(read_quantization(workspace.quantization(name)) for name in quantized),
        reference=_reference(workspace.reference),
        stages=tuple(_stages(workspace, exports, quantized, [*engines], [*measured])),
        prices={
            target: found
            for target, benchmark in benchmarks.items()
            if (found := price_of(benchmark.machine, prices or {}))
        },
    )


def _engine(workspace: Workspace, name: str, engine: config.Engine) -> Engine:
    folder = workspace.engine(engine.target, engine.component)
    manifest = manifests.read(folder, manifests.Engine, verify=False)
    if manifest.onnx.without_weights:  # what is known of them comes with the bundle, as they do
        bundle = workspace.bundle(engine.target, engine.component)
        manifest = manifests.read(bundle, manifests.Bundle, verify=False)
    steps = read_json(workspace.log("build", name) / "resources.json")
    building = [step for step in steps if step["step"].startswith("build ")] or steps
    return Engine(
        name=name,
        target=engine.target,
        component=engine.component,
        precision=engine.precision,
        graph=engine.graph,
        manifest=manifest,
        build_seconds=sum(step["seconds"] for step in building),
        build_memory=max(step["peak_memory_bytes"] for step in building),
    )


def _generated(folder: Path) -> Generated:
    found = read_json(folder / "durations.json")
    images = []
    for index, prompt in enumerate(found["prompts"]):
        path = folder / f"image-{index:02d}.png"
        animation = path.with_suffix(".gif")
        images.append(
            GeneratedImage(
                prompt=prompt,
                seed=found["seed"] + index,
                path=path,
                animation=animation if animation.is_file() else None,
            )
        )
    return Generated(found, tuple(images))


def _reference(folder: Path) -> Reference:
    settings = read_json(folder / "settings.json")
    prompts, steps = settings["prompts"], settings["frame_steps"]
    return Reference(
        sampling=settings["sampling"],
        prompts=tuple(prompts),
        seed=settings["seed"],
        batches=math.ceil(len(prompts) / settings["batch_size"]),
        images=tuple(folder / f"image-{i:02d}.png" for i in range(len(prompts))),
        frames=tuple(folder / f"frame-{i:02d}.png" for i in range(len(steps))),
        frame_steps=tuple(steps),
    )


def _stages(
    workspace: Workspace,
    exports: list[str],
    quantized: list[str],
    engines: list[str],
    measure: list[str],
) -> Iterator[StageLog]:
    """What each stage took, in the order of the DAG; a stage without a log is left out."""
    items: dict[str, list[str | None]] = {
        "download": [None],
        "reference": [None],
        "export": [*exports],
        "simplify": [*exports],
        "quantize": [*quantized],
        "export_program": [*engines],
        "build": [*engines],
        "wrap": [*engines],
        "validate": [*measure],
        "benchmark": [*measure],
        "generate": [*measure],
    }
    for name, keys in items.items():
        logs = {key: workspace.log(name, key) / "resources.json" for key in keys}
        found = {key: read_json(path) for key, path in logs.items() if path.is_file()}
        steps = tuple(
            Step(key or "", step["step"], step["seconds"], step["peak_memory_bytes"])
            for key, log in found.items()
            for step in log
        )
        if steps:
            yield StageLog(name, len(found), steps)
