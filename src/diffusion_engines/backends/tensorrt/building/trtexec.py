"""NVIDIA's ``trtexec``: which version is there, and its command line for that version.

The option names are those of ``samples/common/sampleOptions.cpp`` at each release tag of
https://github.com/NVIDIA/TensorRT; ``tests/data/trtexec_options.json`` holds them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.nvidia.building import profile_shapes
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild
from diffusion_engines.errors import BuildError, HardwareError
from diffusion_engines.families.base import TensorSpec

Version = tuple[int, int, int]

# Before, options have other names, and there is neither an optimization level nor compatibility.
OLDEST: Version = (8, 6, 0)
# From here on networks are strongly typed: the graph says in what each layer runs. Before, builders
# choose among the precisions that flags allow. From 11 on there is nothing else, and no option.
STRONGLY_TYPED: Version = (10, 0, 0)
ALWAYS_STRONGLY_TYPED: Version = (11, 0, 0)
# The first release that has --decomposableAttentions.
DECOMPOSABLE_ATTENTION: Version = (10, 14, 0)
# Of the Python API: before, it has no IProgressMonitor, and its parser's errors name no node.
OLDEST_PYTHON: Version = (10, 0, 0)
# The first release that has an option or a value of it.
SINCE: dict[str, Version] = {
    "precision bf16": (9, 0, 0),
    # Only a strongly typed network keeps to the layers that the graph names.
    "precision fp16-mixed": STRONGLY_TYPED,
    "precision fp8": STRONGLY_TYPED,
    "precision int8": STRONGLY_TYPED,
    "weights stripped": (10, 0, 0),
    "hardware_compatibility same_compute_capability": (10, 9, 0),
}
# Releases that have a value and give wrong results with it: the first of each, and the first after.
# The release notes of 11.3 have it as a known issue that REFIT can drop the bias of a GEMM, also of
# a plan that is never refitted, and that no refit brings it back.
BROKEN: dict[str, tuple[Version, Version]] = {
    "weights refittable": ((11, 3, 0), (11, 4, 0)),
    "weights stripped": ((11, 3, 0), (11, 4, 0)),
}
_PRECISION_FLAGS = {
    "fp32": (),
    "fp16": ("--fp16",),
    "bf16": ("--bf16",),
}
# As set_weights in nvidia/building.
_WEIGHTS_FLAGS = {
    "embedded": (),
    "refittable": ("--refit",),
    "stripped": ("--stripWeights", "--refit"),
}
_HARDWARE = {"same_compute_capability": "sameComputeCapability", "ampere_plus": "ampere+"}


def find_trtexec() -> tuple[Path, Version] | None:
    """Return the ``trtexec`` on PATH and its version, or None.

    Raises:
        HardwareError: it does not say which version it is, e.g. because a library is missing.
    """
    found = shutil.which("trtexec")
    if found is None:
        return None
    path = Path(found)
    try:
        done = subprocess.run(
            [path, "--help"], capture_output=True, text=True, check=False, timeout=120
        )
        output = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        output = str(error)
    banner = re.search(r"\[TensorRT v(\d+(?:\.\d+)*)\]", output)
    if banner is None:
        raise HardwareError(
            f"{path} does not run here",
            expected="a banner with [TensorRT v…]",
            found="\n".join(output.strip().splitlines()[:5]) or "no output",
            fix="install the TensorRT that it belongs to (libnvinfer has to be on the library\n"
            "path), or take it off PATH: the Python builder is used then",
        )
    return path, parse_version(banner.group(1))


def parse_version(text: str) -> Version:
    """Return (major, minor, patch) of ``8601``, ``101303``, ``10.13.3.9`` or ``11.1.0``.

    Up to 9 the number in trtexec's banner has four digits (8601), from 10 on six (101303).
    """
    if "." in text:
        parts = [*(int(part) for part in re.findall(r"\d+", text)), 0, 0]
        return parts[0], parts[1], parts[2]
    number = int(text)
    if number < 10_000:
        return number // 1000, number // 100 % 10, number % 100
    return number // 10_000, number // 100 % 100, number % 100


def format_version(version: Version) -> str:
    """Return ``10.13.3``."""
    return ".".join(map(str, version))


def check_supported(build: TensorRTBuild, precision: str, version: Version) -> None:
    """Raise BuildError where a TensorRT lacks what the settings ask for.

    Raises:
        BuildError: names the setting, and the releases that have it.
    """
    for what, since in SINCE.items():
        key, value = what.split()
        asked = precision if key == "precision" else getattr(build, key)
        if asked == value and version < since:
            raise BuildError(
                f"TensorRT {format_version(version)} has no {key}={value}",
                expected=f"TensorRT {format_version(since)} or later",
                found=format_version(version),
                fix="install a later TensorRT, or change it in conf/target/ or conf/fleet/",
            )
    for what, (first, fixed) in BROKEN.items():
        key, value = what.split()
        if getattr(build, key) == value and first <= version < fixed:
            raise BuildError(
                f"engines of TensorRT {format_version(version)} with {key}={value} can lose a bias",
                expected=f"a TensorRT before {format_version(first)}, or {format_version(fixed)} "
                "or later",
                found=format_version(version),
                fix="install another TensorRT, or set targets.*.build.weights=embedded",
            )


def trtexec_command(
    trtexec: Path,
    version: Version,
    *,
    graph: Graph,
    plan: Path,
    layers: Path | None,
    timing_cache: Path | None,
    build: TensorRTBuild,
) -> list[str]:
    """Return the command that builds ``plan`` from ``graph``.

    Args:
        trtexec: the program.
        version: of it.
        graph: to build.
        plan: gets the engine.
        layers: gets its layer information as JSON, where there is any.
        timing_cache: read if it exists, and written.
        build: conf/build/tensorrt.yaml.

    Raises:
        BuildError: this version lacks something that is asked for.
    """
    check_supported(build, graph.precision, version)
    command = [
        str(trtexec),
        f"--onnx={graph.path}",
        f"--saveEngine={plan}",
        "--skipInference",
        *([f"--exportLayerInfo={layers}"] if layers else []),
        f"--profilingVerbosity={build.profiling_verbosity}",
        f"--builderOptimizationLevel={build.optimization_level}",
        *_typing(version, graph.precision),
        *_WEIGHTS_FLAGS[build.weights],
    ]
    if not build.tf32:
        command.append("--noTF32")
    if version >= DECOMPOSABLE_ATTENTION:
        command.append("--decomposableAttentions=*")  # as parse_graph in building.py
    if build.workspace_mib is not None:
        command.append(f"--memPoolSize=workspace:{build.workspace_mib}")
    if build.max_aux_streams is not None:
        command.append(f"--maxAuxStreams={build.max_aux_streams}")
    if timing_cache is not None:
        command.append(f"--timingCacheFile={timing_cache}")
    if build.version_compatible:
        command.append("--versionCompatible")
    if build.exclude_lean_runtime:
        command.append("--excludeLeanRuntime")
    if build.hardware_compatibility != "none":
        command.append(f"--hardwareCompatibilityLevel={_HARDWARE[build.hardware_compatibility]}")
    return [*command, *_profile(graph.inputs)]


def _typing(version: Version, precision: str) -> tuple[str, ...]:
    if version >= ALWAYS_STRONGLY_TYPED:
        return ()
    return ("--stronglyTyped",) if version >= STRONGLY_TYPED else _PRECISION_FLAGS[precision]


def _profile(inputs: Sequence[TensorSpec]) -> list[str]:
    """Shapes are given for open inputs alone: trtexec refuses them for a static graph."""
    shapes = profile_shapes(inputs)
    if not shapes:
        return []
    return [
        f"--{bound}Shapes="
        + ",".join(f"{name}:{'x'.join(map(str, of[index]))}" for name, of in shapes.items())
        for index, bound in enumerate(("min", "opt", "max"))
    ]
