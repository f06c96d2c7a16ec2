"""A backend for tests: a copy of the graph, run by ONNX Runtime, on hardware that is pretended.

Copied to ``src/diffusion_engines/backends/toy/__init__.py`` of a clone. With ``conf/target/`` and
``conf/build/`` it is all that a backend takes. TOY_GPU names the card of the machine that it plays,
TOY_VERSION the release of its library; without TOY_GPU there is no such card.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT, BuildResult, Graph
from diffusion_engines.errors import FingerprintError, HardwareError
from diffusion_engines.manifests import Engine


@dataclass(config=STRICT)
class Build:
    """Settings of a build (conf/build/toy.yaml)."""

    effort: Annotated[int, Field(ge=0)]


@dataclass(config=STRICT)
class Target:
    """A card that engines are built on."""

    backend: Literal["toy"]
    gpu: str
    build: Build


class Toy:
    """The backend ``toy``."""

    name = "toy"
    settings = Target
    precisions = ("fp32", "fp16")
    graph_format = "onnx"
    code = "src/diffusion_engines/backends/toy"
    shared = "src/diffusion_engines/backends/base.py"
    wrap_code = "src/diffusion_engines/backends/toy"

    def check(self, target: Target, precisions: Collection[str]) -> list[str]:
        return ["gpu: expected a name (conf/target/)"] if not target.gpu else []

    def device(self, target: Target) -> str:
        return "cpu"

    def timing(self, target: Target) -> bool:
        return False

    def builds_without_weights(self, target: Target) -> bool:
        return False

    def check_hardware(self, target: Target) -> None:
        here = os.environ.get("TOY_GPU")
        if here != target.gpu:
            raise HardwareError(
                f"this machine has no {target.gpu}",
                expected=target.gpu,
                found=here or "no toy",
                fix="go to a machine that has one",
            )

    def fingerprint(self, target: Target) -> dict[str, object]:
        self.check_hardware(target)
        return {"gpu": target.gpu, "toy": os.environ.get("TOY_VERSION", "1")}

    def wrap_fingerprint(self, target: Target) -> dict[str, object]:
        return {}

    def build(
        self, graph: Graph, folder: Path, target: Target, timing_cache: Path | None = None
    ) -> BuildResult:
        for file in graph.folder.glob("model.onnx*"):
            shutil.copyfile(file, folder / file.name)
        return BuildResult("model.onnx", "toy 1", "copied", {}, {graph.precision: 1})

    def wrap(
        self, folder: Path, manifest: Engine, weights: Path | None = None
    ) -> dict[str, object]:
        return {}

    def check_loadable(self, manifest: Engine) -> None:
        if not os.environ.get("TOY_GPU"):
            raise FingerprintError("no toy here", expected="one", found="none")

    def load(
        self,
        folder: Path,
        manifest: Engine,
        device: str,
        *,
        cuda_graph: bool = False,
        threads: int | None = None,
    ) -> object:
        import torch

        from diffusion_engines.onnx.session import feeds_of, session_of

        session = session_of(folder / "model.onnx")
        names = [value.name for value in session.get_outputs()]

        class Engine(torch.nn.Module):
            def forward(self, *tensors: torch.Tensor) -> object:
                found = session.run(names, feeds_of(session.get_inputs(), tensors))
                outputs = tuple(torch.from_numpy(value) for value in found)
                return outputs[0] if len(outputs) == 1 else outputs

        return Engine()


BACKEND = Toy()
