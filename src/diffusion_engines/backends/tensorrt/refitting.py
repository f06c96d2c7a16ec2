"""Put weights into a plan that was built without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_engines import manifests
from diffusion_engines.backends.preflight import rebuild
from diffusion_engines.errors import BuildError, IntegrityError
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Engine
from diffusion_engines.onnx.graph import MODEL


def refit_from_graph(trt: Any, bundle: Path, manifest: Engine) -> Callable[[Any, Any], None]:
    """Return what gives an engine the weights of the graph that it was built from.

    The graph's files are compared with those of the build first: TensorRT takes other weights
    without a word. The graph lies in the workspace that the bundle is in.

    Raises:
        IntegrityError: the graph is missing, damaged, or another one.
    """
    folder = _workspace_of(bundle).onnx(manifest.onnx.name)
    if manifests.read(folder, manifests.Graph).files != manifest.onnx.files:
        raise IntegrityError(
            f"{folder} is not the graph that the engine {manifest.name} was built from",
            expected="the hashes in the engine's manifest",
            found="others",
            fix=f"`dvc checkout` the commit of the engine, or {rebuild(manifest)}",
        )

    def refit(engine: Any, logger: Any) -> None:
        refitter = trt.Refitter(engine, logger)
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(folder / MODEL)) or not refitter.refit_cuda_engine():
            raise BuildError(
                f"the engine {manifest.name} could not be given its weights",
                expected=f"those of {folder}",
                fix=f"build it again: `dvc repro --force build@{manifest.name}`",
            )

    return refit


def _workspace_of(path: Path) -> Workspace:
    for parent in path.absolute().parents:
        if parent.name == "artifacts":
            return Workspace(parent.parent)
    raise IntegrityError(
        f"{path} has a plan without weights, and lies in no workspace with its graph",
        expected="a bundle in artifacts/bundles/, beside artifacts/onnx/",
        found=str(path.absolute()),
        fix="load it from the workspace, or build it with build.weights=embedded (conf/build/)",
    )
