"""Read what the other stages left in artifacts/ into plain data.

Only what the current config names is read: folders of other targets may lie beside it. What a
target's measurements are missing is None; what every fleet has (engines, operator tables, the
reference) must be there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines import config, layout
from diffusion_engines.files import read_json, read_manifest

_METRICS = ("rel_l2", "max_abs", "cosine", "not_finite")


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
    manifest: Mapping[str, Any]
    build_seconds: float
    build_memory: float

    @property
    def builder(self) -> str:
        """The backend and its version."""
        return str(self.manifest["builder"])

    @property
    def bytes(self) -> int:
        """The engine's files together, without the manifest."""
        return sum(file["bytes"] for file in self.manifest["files"].values())


@dataclass(frozen=True)
class ComponentParity:
    """How far one engine is from the fp32 reference, at its worst call, beside its tolerance.

    ``calls`` holds the relative L2 of each call in order; ``worst`` and ``gate`` have the keys
    rel_l2, max_abs, cosine, and ``worst`` also not_finite.
    """

    component: str
    precision: str
    worst: Mapping[str, float]
    gate: Mapping[str, float]
    calls: tuple[float, ...]

    def within(self, metric: str) -> bool:
        """Whether a metric is within tolerance; NaN never is."""
        value = self.worst[metric]
        if metric == "not_finite":
            return value == 0
        return value >= self.gate[metric] if metric == "cosine" else value <= self.gate[metric]

    @property
    def passed(self) -> bool:
        """Whether every metric is within tolerance."""
        return all(self.within(metric) for metric in _METRICS)


@dataclass(frozen=True)
class LatentsParity:
    """How far the latents of whole runs are from the reference's, beside their tolerance.

    ``rel_l2[image][step]`` and ``cosine[image][step]`` are those after each step; ``worst`` and
    ``gate`` have the keys rel_l2, cosine, and ``worst`` also not_finite.
    """

    worst: Mapping[str, float]
    gate: Mapping[str, float]
    rel_l2: tuple[tuple[float, ...], ...]
    cosine: tuple[tuple[float, ...], ...]

    @property
    def passed(self) -> bool:
        """Whether the latents are within tolerance after every step; NaN never is."""
        return (
            self.worst["not_finite"] == 0
            and self.worst["rel_l2"] <= self.gate["rel_l2"]
            and self.worst["cosine"] >= self.gate["cosine"]
        )


@dataclass(frozen=True)
class ImageParity:
    """A final image of the engines beside that of the reference: PSNR in dB, SSIM up to 1.

    LPIPS (0 is equal) and CLIP scores (up to 100) are None where they were not measured.
    """

    index: int
    path: Path
    psnr: float
    ssim: float
    passed: bool
    lpips: float | None = None
    clip: float | None = None
    clip_reference: float | None = None


@dataclass(frozen=True)
class Validation:
    """What comparing a target's engines with the reference found."""

    target: str
    components: tuple[ComponentParity, ...]
    latents: LatentsParity
    images: tuple[ImageParity, ...]
    image_gate: Mapping[str, float]
    not_scored: Mapping[str, str]  # LPIPS and CLIP, where they were not measured, and why
    misses: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return (
            not self.misses
            and all(component.passed for component in self.components)
            and self.latents.passed
            and all(image.passed for image in self.images)
        )


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
class Benchmark:
    """A target's engines beside PyTorch: ``latency[runner][phase][statistic]`` in ms.

    ``runners`` holds what each runner is, in words: the baselines, of which the first is what
    speedups are over, then "engines".
    """

    target: str
    runners: Mapping[str, str]
    components: Mapping[str, str]
    latency: Mapping[str, Mapping[str, Mapping[str, float]]]
    memory: Mapping[str, Mapping[str, float]]
    images_per_second: Mapping[str, float]
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def baseline(self) -> str:
        """The runner that speedups are over."""
        return next(iter(self.runners))

    def median(self, runner: str, phase: str) -> float:
        """Median latency in milliseconds."""
        return self.latency[runner][phase]["median_ms"]


@dataclass(frozen=True)
class Operators:
    """What a graph consists of before and after simplification (``onnx/operators.py``)."""

    name: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def rows(self) -> list[tuple[str, int, int]]:
        """Operator, count before, count after; the most frequent ones first."""
        before, after = self.before["operators"], self.after["operators"]
        return sorted(
            ((name, before.get(name, 0), after.get(name, 0)) for name in {*before, *after}),
            key=lambda row: (-row[2], -row[1], row[0]),
        )


@dataclass(frozen=True)
class Quantization:
    """What a lower precision costs, in ONNX Runtime, before any engine (``stages/quantize.py``).

    ``calls`` and ``source_calls`` hold the relative L2 of each recorded call, of the quantized
    graph and of the graph that it was made from; ``lowered`` and ``kept`` count layers by operator.
    """

    name: str
    component: str
    precision: str
    source: str
    calls: tuple[float, ...]
    source_calls: tuple[float, ...]
    calibrated_on: int
    allowed: float
    lowered: Mapping[str, int]
    kept: Mapping[str, int]
    bytes: int

    @property
    def passed(self) -> bool:
        """Whether every call is within tolerance; NaN never is."""
        return all(value <= self.allowed for value in self.calls)


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

    model: config.Model
    image: config.Image
    engines: tuple[Engine, ...]
    measure: tuple[str, ...]
    validations: Mapping[str, Validation]
    benchmarks: Mapping[str, Benchmark]
    generated: Mapping[str, Generated]
    operators: tuple[Operators, ...]
    quantizations: tuple[Quantization, ...]
    reference: Reference
    stages: tuple[StageLog, ...]

    @property
    def synthetic(self) -> bool:
        """Whether the weights are random numbers."""
        made_from = (engine.manifest.get("synthetic", False) for engine in self.engines)
        return self.model.source == "synthetic" or any(made_from)

    @property
    def loras(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What was fused into the weights, by the components that it changed."""
        return {e.component: e.manifest["loras"] for e in self.engines if e.manifest.get("loras")}

    def graph_error(self, onnx: str) -> float | None:
        """The worst relative L2 of a graph in ONNX Runtime, None where none was measured."""
        for found in self.quantizations:
            if onnx == found.name:
                return max(found.calls)
            if onnx == found.source:
                return max(found.source_calls)
        return None

    def machine_of(self, target: str) -> Mapping[str, Any]:
        """The machine that a target was measured on; empty where none is recorded."""
        if target in self.benchmarks:
            return self.benchmarks[target].machine
        return read_json(layout.MACHINE) if layout.MACHINE.is_file() else {}


def collect(
    model: config.Model,
    image: config.Image,
    exports: Mapping[str, config.ExportItem],
    quantized: Mapping[str, config.QuantizedItem],
    engines: Mapping[str, config.Engine],
    measure: Mapping[str, config.Measure],
) -> Report:
    """Read artifacts/ in the order of the config.

    Raises:
        IntegrityError: an engine, an operator table or the reference is missing or damaged.
    """
    reference = _reference()
    measured = tuple(measure)
    return Report(
        model=model,
        image=image,
        engines=tuple(_engine(name, engine) for name, engine in engines.items()),
        measure=measured,
        validations={
            t: _validation(t, reference) for t in measured if _validation_json(t).is_file()
        },
        benchmarks={t: _benchmark(t) for t in measured if _benchmark_json(t).is_file()},
        generated={t: _generated(t) for t in measured if _timings_json(t).is_file()},
        operators=tuple(_operators(name) for name in exports),
        quantizations=tuple(_quantization(name, item) for name, item in quantized.items()),
        reference=reference,
        stages=tuple(_stages([*exports], [*quantized], [*engines], [*measured])),
    )


def _validation_json(target: str) -> Path:
    return layout.validation(target) / "validation.json"


def _benchmark_json(target: str) -> Path:
    return layout.benchmark(target) / "benchmark.json"


def _timings_json(target: str) -> Path:
    return layout.images(target) / "timings.json"


def _engine(name: str, engine: config.Engine) -> Engine:
    manifest = read_manifest(layout.engine(engine.target, engine.component), "engine", verify=False)
    steps = read_json(layout.log("build", name) / "resources.json")
    building = [step for step in steps if step["step"].startswith("build ")] or steps
    return Engine(
        name=name,
        target=engine.target,
        component=engine.component,
        precision=engine.precision,
        manifest=manifest,
        build_seconds=sum(step["seconds"] for step in building),
        build_memory=max(step["peak_memory_bytes"] for step in building),
    )


def _validation(target: str, reference: Reference) -> Validation:
    found = read_json(_validation_json(target))
    calls = _calls(layout.validation(target) / "steps.csv")
    components = tuple(
        ComponentParity(
            component=name,
            precision=found["components"][name]["precision"],
            worst={metric: found["components"][name][metric] for metric in _METRICS},
            gate=found["gates"][name],
            calls=calls.get(name, ()),
        )
        for name in sorted(found["components"])  # text encoders, UNet, VAE: as they run
    )
    gate, scores = found["image_gate"], found["scores"]

    def score(name: str, whose: str, index: int) -> float | None:
        values = scores[name][whose]
        return values[index] if values else None

    images = tuple(
        ImageParity(
            index=index,
            path=layout.validation(target) / f"image-{index:02d}.png",
            psnr=image["psnr"],
            ssim=image["ssim"],
            passed=image["psnr"] >= gate["psnr"] and image["ssim"] >= gate["ssim"],
            lpips=score("lpips", "images", index),
            clip=score("clip", "images", index),
            clip_reference=score("clip", "reference", index),
        )
        for index, image in enumerate(found["images"][: len(reference.prompts)])
    )
    return Validation(
        target=target,
        components=components,
        latents=_latents(target, found),
        images=images,
        image_gate=gate,
        not_scored={name: one["missing"] for name, one in scores.items() if one["missing"]},
        misses=tuple(found["misses"]),
    )


def _latents(target: str, found: Mapping[str, Any]) -> LatentsParity:
    rel_l2: dict[str, list[float]] = {}
    cosine: dict[str, list[float]] = {}
    with (layout.validation(target) / "trajectory.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rel_l2.setdefault(row["image"], []).append(float(row["rel_l2"]))
            cosine.setdefault(row["image"], []).append(float(row["cosine"]))
    return LatentsParity(
        worst=found["latents"],
        gate=found["latents_gate"],
        rel_l2=tuple(map(tuple, rel_l2.values())),
        cosine=tuple(map(tuple, cosine.values())),
    )


def _calls(path: Path) -> dict[str, tuple[float, ...]]:
    """Relative L2 of every call, by component, in the order of the calls."""
    calls: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            broken = int(float(row["not_finite"])) > 0
            calls.setdefault(row["component"], []).append(
                math.inf if broken else float(row["rel_l2"])
            )
    return {name: tuple(values) for name, values in calls.items()}


def _benchmark(target: str) -> Benchmark:
    found = read_json(_benchmark_json(target))
    keys = (
        "components",
        "latency",
        "memory",
        "images_per_second",
        "machine",
        "settings",
    )
    return Benchmark(
        target, **{key: found[key] for key in keys} | {"runners": dict(found["runners"])}
    )


def _generated(target: str) -> Generated:
    found = read_json(_timings_json(target))
    images = []
    for index, prompt in enumerate(found["prompts"]):
        path = layout.images(target) / f"image-{index:02d}.png"
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


def _operators(name: str) -> Operators:
    found = read_json(layout.operators(name) / "operators.json")
    return Operators(name, found["before"], found["after"])


def _quantization(name: str, item: config.QuantizedItem) -> Quantization:
    folder = layout.quantization(name)
    found = read_json(folder / "quantization.json")
    with (folder / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Quantization(
        name=name,
        component=item.component,
        precision=item.precision,
        source=found["source"],
        calls=tuple(float(row["rel_l2"]) for row in rows),  # infinite where a value is not finite
        source_calls=tuple(float(row["source_rel_l2"]) for row in rows),
        calibrated_on=found["calls"],
        allowed=found["allowed"],
        lowered=found["lowered"],
        kept=found["kept"],
        bytes=found["bytes"],
    )


def _reference() -> Reference:
    settings = read_json(layout.REFERENCE / "settings.json")
    prompts, steps = settings["prompts"], settings["frame_steps"]
    return Reference(
        sampling=settings["sampling"],
        prompts=tuple(prompts),
        seed=settings["seed"],
        batches=math.ceil(len(prompts) / settings["batch_size"]),
        images=tuple(layout.REFERENCE / f"image-{i:02d}.png" for i in range(len(prompts))),
        frames=tuple(layout.REFERENCE / f"frame-{i:02d}.png" for i in range(len(steps))),
        frame_steps=tuple(steps),
    )


def _stages(
    exports: list[str], quantized: list[str], engines: list[str], measure: list[str]
) -> Iterator[StageLog]:
    """What each stage took, in the order of the DAG; a stage without a log is left out."""
    items: dict[str, list[str | None]] = {
        "download": [None],
        "reference": [None],
        "export": [*exports],
        "simplify": [*exports],
        "quantize": [*quantized],
        "build": [*engines],
        "wrap": [*engines],
        "validate": [*measure],
        "benchmark": [*measure],
        "generate": [*measure],
    }
    for name, keys in items.items():
        logs = {key: layout.log(name, key) / "resources.json" for key in keys}
        found = {key: read_json(path) for key, path in logs.items() if path.is_file()}
        steps = tuple(
            Step(key or "", step["step"], step["seconds"], step["peak_memory_bytes"])
            for key, log in found.items()
            for step in log
        )
        if steps:
            yield StageLog(name, len(found), steps)
