"""TensorRT for RTX: engines for GeForce and professional RTX GPUs, built without a GPU.

The compute capabilities are named in the target, so that one machine builds for a whole fleet.
The runtime compiles its last stage on the user's GPU when an engine is first loaded.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends.base import Backend, BuildResult, Graph
from diffusion_engines.backends.preflight import recorded
from diffusion_engines.backends.tensorrt_rtx.settings import TensorRTRTXTarget, check_target
from diffusion_engines.manifests import Engine

if TYPE_CHECKING:
    from torch import nn


class _TensorRTRTX:
    name = "tensorrt_rtx"
    settings = TensorRTRTXTarget
    precisions = ("fp32", "fp16", "bf16", "fp16-mixed", "fp8", "int8")
    graph_format = "onnx"
    code = "src/diffusion_engines/backends/tensorrt_rtx/building.py"
    shared = "src/diffusion_engines/backends/nvidia/building"
    wrap_code = "src/diffusion_engines/backends/nvidia/wrapping"

    def check(self, target: TensorRTRTXTarget, precisions: Collection[str]) -> list[str]:
        return check_target(target, precisions)

    def device(self, target: TensorRTRTXTarget) -> str:
        return "cuda"

    def timing(self, target: TensorRTRTXTarget) -> bool:
        return False

    def builds_without_weights(self, target: TensorRTRTXTarget) -> bool:
        return target.build.weights == "stripped"

    def check_hardware(self, target: TensorRTRTXTarget) -> None:
        from diffusion_engines.backends.tensorrt_rtx.fingerprint import check_gpu

        check_gpu(target)

    def fingerprint(self, target: TensorRTRTXTarget) -> Mapping[str, object]:
        from diffusion_engines.backends.tensorrt_rtx.fingerprint import fingerprint_of

        return fingerprint_of(target)

    def wrap_fingerprint(self, target: TensorRTRTXTarget) -> Mapping[str, object]:
        from diffusion_engines.backends.nvidia.wrapping.distribution import wrap_fingerprint

        return wrap_fingerprint(self.name, target.wrap)

    def build(
        self,
        graph: Graph,
        folder: Path,
        target: TensorRTRTXTarget,
        timing_cache: Path | None = None,
    ) -> BuildResult:
        from diffusion_engines.backends.tensorrt_rtx.building import build

        return build(graph, folder, target)

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
        from diffusion_engines.backends.tensorrt_rtx.running import check_loadable

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
        from diffusion_engines.backends.tensorrt_rtx.running import load

        return load(folder, manifest, device, cuda_graph=cuda_graph)


BACKEND: Backend[TensorRTRTXTarget] = _TensorRTRTX()
