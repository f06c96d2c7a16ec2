"""Where each stage writes, below a workspace's root; dvc.yaml names the same paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """A working copy of the repository: where everything lies in it.

    Library functions take one, or paths of it; none reads the current folder.

    Attributes:
        root: the folder that holds dvc.yaml.
    """

    root: Path = Path()

    @property
    def artifacts(self) -> Path:
        """What DVC's stages write."""
        return self.root / "artifacts"

    @property
    def checked_conf(self) -> Path:
        """A constant that says that params.yaml was checked."""
        return self.artifacts / "checks" / "conf.json"

    @property
    def weights(self) -> Path:
        """A diffusers folder with a manifest in each of its folders."""
        return self.artifacts / "weights"

    @property
    def reference(self) -> Path:
        """The recorded fp32 pipeline."""
        return self.artifacts / "reference"

    @property
    def report(self) -> Path:
        """The page, tables and figures."""
        return self.artifacts / "report"

    def export(self, graph: str) -> Path:
        """The graph as the exporter wrote it, e.g. of ``unet-fp16``."""
        return self.artifacts / "exports" / graph

    def onnx(self, graph: str) -> Path:
        """The graph that engines are built from: simplified, or quantized."""
        return self.artifacts / "onnx" / graph

    def structure(self, graph: str) -> Path:
        """The graph without its weights, of which fine-tunes have equal ones."""
        return self.artifacts / "structures" / graph

    def program(self, target: str, component: str) -> Path:
        """The exported program that an engine is built from, in the PyTorch of its target."""
        return self.artifacts / "programs" / target / component

    def quantization(self, graph: str) -> Path:
        """What the quantized graph costs in accuracy, per call, e.g. of ``unet-int8``."""
        return self.artifacts / "quantization" / graph

    def quantize_auto(self, graph: str) -> Path:
        """What was found of the layers of a graph that can have 8 bits: for people, of no stage."""
        return self.artifacts / "quantize-auto" / graph

    def operators(self, graph: str) -> Path:
        """Operator counts before and after simplification."""
        return self.artifacts / "operators" / graph

    def parity(self, graph: str) -> Path:
        """How far a simplified graph is from the reference, per call."""
        return self.artifacts / "parity" / graph

    def fingerprint(self, target: str) -> Path:
        """What builds for a target depend on beyond their inputs; tracked in git."""
        return self.artifacts / "fingerprints" / f"{target}.json"

    def wrap_fingerprint(self, target: str) -> Path:
        """What wrapping a target's engines depends on beyond them; tracked in git."""
        return self.artifacts / "fingerprints" / f"{target}-wrap.json"

    def machine(self, target: str) -> Path:
        """On which machine a target's timings were taken; tracked in git."""
        return self.artifacts / "machines" / f"{target}.json"

    def timing(self, target: str) -> Path:
        """Timing caches of a target's builds, a folder per fingerprint."""
        return self.artifacts / "timing" / target

    def engine(self, target: str, component: str) -> Path:
        """The engine of one component."""
        return self.artifacts / "engines" / target / component

    def bundles(self, target: str) -> Path:
        """All bundles of a target."""
        return self.artifacts / "bundles" / target

    def bundle(self, target: str, component: str) -> Path:
        """An engine that can be loaded from PyTorch, self-contained."""
        return self.bundles(target) / component

    def pipeline(self, target: str) -> Path:
        """What a pipeline needs besides the engines of a target, beside their bundles."""
        return self.bundles(target) / "pipeline"

    def images(self, target: str) -> Path:
        """The images of the config's prompts, made by the engines of a target."""
        return self.artifacts / "images" / target

    def validation(self, target: str) -> Path:
        """Images of the engine pipeline and errors per timestep."""
        return self.artifacts / "validation" / target

    def benchmark(self, target: str) -> Path:
        """Latencies of every phase of every run."""
        return self.artifacts / "benchmark" / target

    def alternatives(self, target: str) -> Path:
        """Which engines are loaded on the hardware of a target that has alternatives."""
        return self.artifacts / "alternatives" / target

    def metrics(self, stage: str, key: str) -> Path:
        """The few numbers that ``dvc metrics show`` and ``dvc exp show`` print."""
        return self.artifacts / "metrics" / stage / f"{key}.json"

    def plot(self, stage: str, target: str) -> Path:
        """The table that ``dvc plots show`` draws."""
        return self.artifacts / "plots" / stage / f"{target}.csv"

    def plots(self, stage: str, target: str) -> Path:
        """The tables that ``dvc plots show`` draws, where a stage has several."""
        return self.artifacts / "plots" / stage / target

    def log(self, stage: str, key: str | None) -> Path:
        """Time and memory of a stage, and the log of the tool that it ran."""
        folder = self.artifacts / "logs" / stage
        return folder / key if key else folder
