"""TensorRT: engines for data-centre and other NVIDIA GPUs, built on the GPU that runs them.

Built by ``trtexec`` where it is on PATH, else by TensorRT's Python builder with the same settings.
TensorRT 8.6, 9, 10 and 11. An engine belongs to one release of TensorRT and one GPU model, unless
conf/build/tensorrt.yaml says otherwise.
https://docs.nvidia.com/deeplearning/tensorrt/latest/
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends.base import Backend, BuildResult, Graph
from diffusion_engines.backends.preflight import recorded
from diffusion_engines.backends.tensorrt.settings import TensorRTTarget, check_target
from diffusion_engines.manifests import Engine

if TYPE_CHECKING:
    from torch import nn


class _TensorRT:
    name = "tensorrt"
    settings = TensorRTTarget
    precisions = ("fp32", "fp16", "bf16", "fp16-mixed", "fp8", "int8")
    graph_format = "onnx"
    code = "src/diffusion_engines/backends/tensorrt/building"
    shared = "src/diffusion_engines/backends/nvidia/building"
    wrap_code = "src/diffusion_engines/backends/nvidia/wrapping"

    def check(self, target: TensorRTTarget, precisions: Collection[str]) -> list[str]:
        return check_target(target, precisions)

    def device(self, target: TensorRTTarget) -> str:
        return "cuda"

    def timing(self, target: TensorRTTarget) -> bool:
        return target.build.timing_cache

    def builds_without_weights(self, target: TensorRTTarget) -> bool:
        return target.build.weights == "stripped"

    def check_hardware(self, target: TensorRTTarget) -> None:
        from diffusion_engines.backends.tensorrt.fingerprint import gpu_of

        gpu_of(target)

    def fingerprint(self, target: TensorRTTarget) -> Mapping[str, object]:
        from diffusion_engines.backends.tensorrt.fingerprint import fingerprint_of

        return fingerprint_of(target)

    def wrap_fingerprint(self, target: TensorRTTarget) -> Mapping[str, object]:
        from diffusion_engines.backends.nvidia.wrapping.distribution import wrap_fingerprint

        return wrap_fingerprint(self.name, target.wrap)

    def build(
        self, graph: Graph, folder: Path, target: TensorRTTarget, timing_cache: Path | None = None
    ) -> BuildResult:
        from diffusion_engines.backends.tensorrt.building import build

        return build(graph, folder, target, timing_cache)

    def wrap(
        self, folder: Path, manifest: Engine, weights: Path | None = None
    ) -> Mapping[str, object]:
        from diffusion_engines.backends.nvidia.wrapping import add_weights, wrap_plan

        if weights is not None:
            add_weights(folder, manifest, weights)
        wrap = recorded(manifest, "settings", "wrap", list)
        if not wrap:
            return {}
        self.check_loadable(manifest)
        return wrap_plan(folder, manifest, self.name, wrap)

    def check_loadable(self, manifest: Engine) -> None:
        from diffusion_engines.backends.tensorrt.running import check_loadable

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
        from diffusion_engines.backends.tensorrt.running import load

        return load(folder, manifest, device, cuda_graph=cuda_graph)


BACKEND: Backend[TensorRTTarget] = _TensorRT()
