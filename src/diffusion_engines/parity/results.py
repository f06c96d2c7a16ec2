"""What the stages `simplify`, `quantize` and `validate` found: their types, written and read here.

No PyTorch in here: the report reads these.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_engines.config import Gate, ImageGate, LatentsGate
from diffusion_engines.families import role_of
from diffusion_engines.files import write_json, write_table
from diffusion_engines.parity.distances import Difference, largest, smallest, worst_of
from diffusion_engines.parity.gates import misses_of
from diffusion_engines.results import read_result, write_result

# Raise them when a field of a result changes.
_VERSION = 1
_VALIDATION = 2


@dataclass(frozen=True)
class ComponentParity:
    """How far one engine is from the fp32 reference at every recorded call, in order.

    ``misses`` describes what is out of tolerance, here and below.
    """

    component: str
    precision: str
    gate: Gate
    calls: tuple[Difference, ...]
    misses: tuple[str, ...]

    @property
    def worst(self) -> Difference:
        """The worst of each distance over all calls."""
        return worst_of(self.calls)


@dataclass(frozen=True)
class LatentsParity:
    """How far the latents of whole runs are: ``images[image][step]``, after each step."""

    gate: LatentsGate
    images: tuple[tuple[Difference, ...], ...]
    misses: tuple[str, ...]

    @property
    def worst(self) -> Difference:
        """The worst of each distance over all images and steps."""
        return worst_of([found for image in self.images for found in image])


@dataclass(frozen=True)
class ImageParity:
    """A final image of the engines beside that of the reference: PSNR in dB, SSIM up to 1.

    ``file`` lies beside the result. LPIPS (0 is equal) and CLIP scores (up to 100) are None where
    they were not measured.
    """

    file: str
    psnr: float
    ssim: float
    misses: tuple[str, ...]
    lpips: float | None = None
    clip: float | None = None
    clip_reference: float | None = None


@dataclass(frozen=True)
class Validation:
    """What comparing a target's engines with the reference found.

    ``not_scored`` holds why LPIPS and CLIP scores were not measured, by name, where they were not;
    ``bundles`` the SHA-256 of the manifest of each engine's bundle, so that nobody takes this for a
    validation of other bytes.
    """

    target: str
    components: tuple[ComponentParity, ...]
    latents: LatentsParity
    image_gate: ImageGate
    images: tuple[ImageParity, ...]
    not_scored: Mapping[str, str]
    bundles: Mapping[str, str]

    @property
    def misses(self) -> tuple[str, ...]:
        """Everything that is out of tolerance."""
        components = [miss for part in self.components for miss in part.misses]
        images = [miss for image in self.images for miss in image.misses]
        return (*components, *self.latents.misses, *images)


def write_validation(
    result: Validation, pictures: Sequence[Image.Image], folder: Path, metrics: Path, plots: Path
) -> None:
    """Write ``validation.json``, tables and pictures into ``folder``, and what DVC shows.

    Args:
        result: of the target.
        pictures: one for each of the result's images.
        folder: gets the details, ``steps.csv`` and ``trajectory.csv`` for people among them.
        metrics: a file that gets the worst values.
        plots: a folder that gets the errors along the trajectories as tables, and the pictures.
    """
    calls = [
        {"component": part.component, "call": index, **asdict(found)}
        for part in result.components
        for index, found in enumerate(part.calls)
    ]
    trajectory = [
        {"image": index, "step": step, **asdict(found)}
        for index, image in enumerate(result.latents.images)
        for step, found in enumerate(image, 1)
    ]
    for image, picture in zip(result.images, pictures, strict=True):
        for shown in (folder, plots / "images"):
            shown.mkdir(parents=True, exist_ok=True)
            picture.save(shown / image.file)
    write_table(folder / "steps.csv", calls)
    write_table(folder / "trajectory.csv", trajectory)
    # The denoiser is the one component with a trajectory to plot.
    steps = [row for row in calls if role_of(row["component"]) == "denoiser"]
    write_table(plots / "denoiser.csv", steps or calls)
    write_table(plots / "latents.csv", trajectory)
    write_result(folder / "validation.json", result, version=_VALIDATION)
    write_json(metrics, _validation_metrics(result))


def _validation_metrics(result: Validation) -> dict[str, Any]:
    worst = {part.component: part.worst for part in result.components}
    latents = result.latents.worst
    lpips = [image.lpips for image in result.images if image.lpips is not None]
    clip = [image.clip for image in result.images if image.clip is not None]
    reference = [i.clip_reference for i in result.images if i.clip_reference is not None]
    return {
        **{f"{component}_rel_l2": found.rel_l2 for component, found in worst.items()},
        "not_finite": sum(found.not_finite for found in worst.values()),
        "latents_rel_l2": latents.rel_l2,
        "latents_cosine": latents.cosine,
        "psnr": smallest(image.psnr for image in result.images),
        "ssim": smallest(image.ssim for image in result.images),
        "lpips": largest(lpips) if lpips else None,
        "clip": statistics.mean(clip) if clip else None,
        "clip_reference": statistics.mean(reference) if reference else None,
    }


def read_validation(folder: Path) -> Validation:
    """Read what :func:`write_validation` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(
        folder / "validation.json",
        Validation,
        version=_VALIDATION,
        stage=f"validate@{folder.name}",
    )


@dataclass(frozen=True)
class GraphCheck:
    """How far a graph is from fp32 PyTorch in ONNX Runtime, before any engine is built from it.

    Attributes:
        name: of the graph.
        gate: of its component in its precision, the one that engines are held to.
        calls: the distance at each recorded call, in order; empty where ONNX Runtime cannot run it.
        misses: what is out of tolerance.
    """

    name: str
    gate: Gate
    calls: tuple[Difference, ...]
    misses: tuple[str, ...]

    @property
    def worst(self) -> Difference | None:
        """The worst of each distance over all calls; None where the graph is unchecked."""
        return worst_of(self.calls) if self.calls else None


def write_graph_check(result: GraphCheck, folder: Path) -> None:
    """Write ``parity.json`` and, for people, ``steps.csv``."""
    if result.calls:
        rows = [{"call": index, **asdict(found)} for index, found in enumerate(result.calls)]
        write_table(folder / "steps.csv", rows)
    write_result(folder / "parity.json", result, version=_VERSION)


def read_graph_check(folder: Path) -> GraphCheck:
    """Read what :func:`write_graph_check` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(
        folder / "parity.json", GraphCheck, version=_VERSION, stage=f"simplify@{folder.name}"
    )


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
        graph = worst_of(self.graph)
        return {
            "rel_l2": graph.rel_l2,
            "source_rel_l2": worst_of(self.source).rel_l2,
            "not_finite": graph.not_finite,
        }

    def misses(self, allowed: float) -> list[str]:
        """Describe every call whose relative L2 error exceeds ``allowed``."""
        return [
            miss
            for index, found in enumerate(self.graph)
            for miss in misses_of(f"call {index}", {"rel_l2": allowed}, asdict(found))
        ]


@dataclass(frozen=True)
class Quantization:
    """What a lower precision costs, in ONNX Runtime, before any engine.

    Attributes:
        name: of the quantized graph.
        source: the graph that it was made from.
        calls: how many recorded calls it was calibrated on.
        allowed: relative L2 error at any call.
        bytes: of the graph and its weights.
        lowered: how many layers have the precision, by operator.
        kept: how many have the source's, by operator.
        parity: of all recorded calls.
        misses: the calls that exceed ``allowed``.
    """

    name: str
    source: str
    calls: int
    allowed: float
    bytes: int
    lowered: Mapping[str, int]
    kept: Mapping[str, int]
    parity: GraphParity
    misses: tuple[str, ...]


def write_quantization(result: Quantization, folder: Path, metrics: Path) -> None:
    """Write ``quantization.json`` and, for people, ``steps.csv``; the worst values for DVC."""
    write_table(folder / "steps.csv", result.parity.rows())
    write_result(folder / "quantization.json", result, version=_VERSION)
    write_json(metrics, result.parity.worst())


def read_quantization(folder: Path) -> Quantization:
    """Read what :func:`write_quantization` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(
        folder / "quantization.json",
        Quantization,
        version=_VERSION,
        stage=f"quantize@{folder.name}",
    )
