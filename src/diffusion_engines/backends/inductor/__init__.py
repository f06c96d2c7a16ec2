"""PyTorch's own compiler, ahead of time (AOTInductor): CPUs, and NVIDIA GPUs.

An engine is a shared library without weights, so that everything of one architecture shares it; a
bundle has the weights beside it, in safetensors.
https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends import gpus
from diffusion_engines.backends.base import Backend, BuildResult, Graph
from diffusion_engines.backends.inductor.settings import InductorTarget, keeps_timings
from diffusion_engines.errors import HardwareError
from diffusion_engines.manifests import Engine

if TYPE_CHECKING:
    from torch import nn

_FOLDER = "src/diffusion_engines/backends/inductor"


class _Inductor:
    name = "inductor"
    settings = InductorTarget
    precisions = ("fp32", "fp16", "bf16")
    graph_format = "exported_program"
    code = f"{_FOLDER}/building"
    shared = "src/diffusion_engines/programs/reading.py"
    wrap_code = f"{_FOLDER}/wrapping.py"

    def check(self, target: InductorTarget, precisions: Collection[str]) -> list[str]:
        if target.device == "cpu" and target.gpu is not None:
            return [f"gpu: a CPU is none, expected null, found {target.gpu} (conf/target/)"]
        capability = gpus.CAPABILITIES.get(target.gpu or "")
        lacking = gpus.lacking(capability, precisions) if capability else []
        return [f"gpu: {problem} (conf/fleet/)" for problem in lacking]

    def device(self, target: InductorTarget) -> str:
        return target.device

    def timing(self, target: InductorTarget) -> bool:
        return keeps_timings(target)

    def builds_without_weights(self, target: InductorTarget) -> bool:
        return True

    def check_hardware(self, target: InductorTarget) -> None:
        if target.device == "cpu":
            return
        gpu = gpus.any_gpu()
        if target.gpu is not None and not gpu.is_a(target.gpu):
            raise HardwareError(
                f"this machine's GPU is no {target.gpu}",
                expected=target.gpu,
                found=str(gpu),
                fix="run it where there is one, or take the target cuda_inductor (conf/target/)",
            )

    def fingerprint(self, target: InductorTarget) -> Mapping[str, object]:
        from diffusion_engines.backends.inductor.fingerprint import fingerprint_of

        self.check_hardware(target)
        return fingerprint_of(target.device)

    def wrap_fingerprint(self, target: InductorTarget) -> Mapping[str, object]:
        return {}

    def build(
        self, graph: Graph, folder: Path, target: InductorTarget, timing_cache: Path | None = None
    ) -> BuildResult:
        from diffusion_engines.backends.inductor.building import build

        return build(graph, folder, target, timing_cache)

    def wrap(
        self, folder: Path, manifest: Engine, weights: Path | None = None
    ) -> Mapping[str, object]:
        from diffusion_engines.backends.inductor.wrapping import add_weights

        assert weights is not None, "its graphs are programs, which have none"
        add_weights(folder, manifest, weights)
        return {}

    def check_loadable(self, manifest: Engine) -> None:
        from diffusion_engines.backends.inductor.running import check_loadable

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
        from diffusion_engines.backends.inductor.running import load

        return load(folder, manifest, cuda_graph=cuda_graph)


BACKEND: Backend[InductorTarget] = _Inductor()
