"""ONNX Runtime: CPUs everywhere, NVIDIA GPUs where onnxruntime-gpu is installed.

An engine is the graph after ONNX Runtime's own optimizations, saved. From level "all" on it
contains layouts that fit one instruction set, hence the fingerprint.
https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends import gpus
from diffusion_engines.backends.base import Backend, BuildResult, Graph
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeTarget
from diffusion_engines.manifests import Engine

if TYPE_CHECKING:
    from torch import nn

_FOLDER = "src/diffusion_engines/backends/onnxruntime"


class _OnnxRuntime:
    name = "onnxruntime"
    settings = OnnxRuntimeTarget
    precisions = ("fp32", "fp16", "fp16-mixed", "fp8", "int8")
    graph_format = "onnx"
    code = f"{_FOLDER}/building.py"
    shared = f"{_FOLDER}/session.py"
    wrap_code = "src/diffusion_engines/backends/base.py"  # wrapping copies files

    def check(self, target: OnnxRuntimeTarget, precisions: Collection[str]) -> list[str]:
        return []

    def device(self, target: OnnxRuntimeTarget) -> str:
        return target.device

    def timing(self, target: OnnxRuntimeTarget) -> bool:
        return False

    def builds_without_weights(self, target: OnnxRuntimeTarget) -> bool:
        return False

    def check_hardware(self, target: OnnxRuntimeTarget) -> None:
        if target.device == "cuda":
            gpus.any_gpu()

    def fingerprint(self, target: OnnxRuntimeTarget) -> Mapping[str, object]:
        from diffusion_engines.backends.onnxruntime.fingerprint import fingerprint_of

        return fingerprint_of(target.device)

    def wrap_fingerprint(self, target: OnnxRuntimeTarget) -> Mapping[str, object]:
        return {}

    def build(
        self,
        graph: Graph,
        folder: Path,
        target: OnnxRuntimeTarget,
        timing_cache: Path | None = None,
    ) -> BuildResult:
        from diffusion_engines.backends.onnxruntime.building import build

        return build(graph, folder, target)

    def wrap(
        self, folder: Path, manifest: Engine, weights: Path | None = None
    ) -> Mapping[str, object]:
        return {}

    def check_loadable(self, manifest: Engine) -> None:
        from diffusion_engines.backends.onnxruntime.running import check_loadable

        check_loadable(manifest)

    def load(
        self,
        folder: Path,
        manifest: Engine,
        device: str,
        *,
        cuda_graph: bool = False,
        threads: int | None = None,
    ) -> nn.Module:
        from diffusion_engines.backends.onnxruntime.running import load

        return load(folder, manifest, cuda_graph=cuda_graph, threads=threads)


BACKEND: Backend[OnnxRuntimeTarget] = _OnnxRuntime()
