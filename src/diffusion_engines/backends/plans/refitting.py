"""Put weights into a plan that was built without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusion_engines import layout
from diffusion_engines.errors import BuildError, IntegrityError
from diffusion_engines.files import read_manifest
from diffusion_engines.onnx.graph import MODEL


def refit_from_graph(trt: Any, manifest: Mapping[str, Any]) -> Callable[[Any, Any], None]:
    """Return what gives an engine the weights of the graph that it was built from.

    The graph's files are compared with those of the build first: TensorRT takes other weights
    without a word.

    Raises:
        IntegrityError: the graph is missing, damaged, or another one.
    """
    built = manifest["onnx"]
    folder = layout.onnx(built["name"])
    if read_manifest(folder, "onnx")["files"] != built["files"]:
        raise IntegrityError(
            f"{folder} is not the graph that the engine {manifest['name']} was built from",
            expected="the hashes in the engine's manifest",
            found="others",
            fix=f"`dvc checkout` the commit of the engine, or `dvc repro build@{manifest['name']}`",
        )

    def refit(engine: Any, logger: Any) -> None:
        refitter = trt.Refitter(engine, logger)
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(folder / MODEL)) or not refitter.refit_cuda_engine():
            raise BuildError(
                f"the engine {manifest['name']} could not be given its weights",
                expected=f"those of {folder}",
                fix=f"build it again: `dvc repro --force build@{manifest['name']}`",
            )

    return refit
