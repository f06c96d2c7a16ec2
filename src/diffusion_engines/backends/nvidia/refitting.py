"""Give a plan that was built without weights those of its bundle, whenever it is loaded.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/refitting-engines.html
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_engines.backends.nvidia.building.stand_in import weights_of
from diffusion_engines.backends.nvidia.wrapping.weights import GRAPH
from diffusion_engines.backends.preflight import rebuild, recorded
from diffusion_engines.errors import BuildError, IntegrityError
from diffusion_engines.manifests import Engine

_SHOWN = 5


def refit_at_load(trt: Any, bundle: Path, manifest: Engine) -> Callable[[Any, Any], None] | None:
    """Return what gives a bundle's engine its weights, None where the plan has them.

    Args:
        trt: the Python module of TensorRT or TensorRT-RTX.
        bundle: its folder, whose files were compared with the manifest.
        manifest: of it.

    Raises:
        IntegrityError: the bundle has no weights to give.
    """
    # Manifests of TensorRT-RTX had no such key: its plans had their weights.
    if recorded(manifest, "settings", "build", dict).get("weights") != "stripped":
        return None
    if GRAPH not in manifest.files:
        raise IntegrityError(
            f"the plan of {manifest.name} has no weights, and neither has its bundle",
            expected=f"{GRAPH} and its data, as `wrap` adds them",
            found=", ".join(manifest.files),
            fix=f"build it with this version of diffusion-engines: {rebuild(manifest)}",
        )
    return functools.partial(refit, trt, manifest, bundle / GRAPH)


def refit(trt: Any, manifest: Engine, graph: Path, engine: Any, logger: Any) -> None:
    """Give an engine the weights of a graph, by the names of its initializers.

    TensorRT keeps any weights that it is not given, and takes no notice of any that it does not
    know: both are asked for, so that no engine computes with what it was built with.

    Args:
        trt: the Python module.
        manifest: of the engine.
        graph: of the structure that the engine was built from, with weights.
        engine: of the library, not in use meanwhile.
        logger: of the library.

    Raises:
        BuildError: weights are missing, the engine does not take some, or the library failed.
    """
    refitter = trt.Refitter(engine, logger)
    given = [tensor.name for tensor in weights_of(graph)]
    taken = set(refitter.get_all_weights())
    if lost := [name for name in given if name not in taken]:
        raise _failure(manifest, graph, f"the plan has no place for {_listed(lost)}")
    parser = trt.OnnxParserRefitter(refitter, logger)
    parsed = parser.refit_from_file(str(graph))
    if missing := refitter.get_missing_weights():
        raise _failure(manifest, graph, f"no weights for {_listed(missing)}")
    if not parsed:
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _failure(manifest, graph, "\n".join(errors[:_SHOWN]) or "no message of the parser")
    if not refitter.refit_cuda_engine():
        raise _failure(manifest, graph, "the library failed; its log says why")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _failure(manifest: Engine, graph: Path, found: str) -> BuildError:
    return BuildError(
        f"the engine {manifest.name} could not be given its weights",
        expected=f"all of those of {graph}, and of no others",
        found=found,
        fix="set targets.*.build.weights=embedded (conf/target/), which builds them into the\n"
        f"plan, and {rebuild(manifest)}",
    )
