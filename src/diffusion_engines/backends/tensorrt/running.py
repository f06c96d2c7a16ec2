"""Run a plan of TensorRT, after comparing its fingerprint with this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.backends.preflight import (
    check_platform,
    foreign_gpu,
    rebuild,
    recorded,
    require_gpu,
)
from diffusion_engines.backends.tensorrt.building.trtexec import (
    Version,
    format_version,
    parse_version,
)
from diffusion_engines.backends.tensorrt.building.versions import library
from diffusion_engines.errors import FingerprintError
from diffusion_engines.manifests import Engine

if TYPE_CHECKING:
    from torch import nn


def check_loadable(manifest: Engine) -> None:
    """Compare an engine's fingerprint with this machine, before TensorRT sees the engine.

    Raises:
        IntegrityError: the manifest has no complete fingerprint.
        HardwareError: the library or a GPU is missing.
        FingerprintError: another TensorRT, platform or GPU than the engine's.
    """
    built = parse_version(recorded(manifest, "fingerprint", "tensorrt", str))
    capability = recorded(manifest, "fingerprint", "compute_capability", str)
    name = recorded(manifest, "fingerprint", "gpu", str)
    compatible = recorded(manifest, "settings", "build.version_compatible", bool)
    # Another release runs such a plan through the lean runtime in it, which was left out here.
    # `Runtime.load_runtime` would take that of the build's release as a file beside the plan.
    if compatible and recorded(manifest, "settings", "build.exclude_lean_runtime", bool):
        compatible = False
    compatibility = recorded(manifest, "settings", "build.hardware_compatibility", str)
    check_platform(manifest)
    here = parse_version(library().__version__)
    check_version(manifest, built, here, compatible=compatible)
    gpu = require_gpu(manifest, f"{name}, compute capability {capability}")
    check_gpu(manifest, Gpu(name, capability), gpu, compatibility)


def check_version(manifest: Engine, built: Version, here: Version, *, compatible: bool) -> None:
    """Compare releases: a plan is for one, a version-compatible one also for later minor ones.

    Raises:
        FingerprintError: this release does not run the plan.
    """
    if here == built or (compatible and here[0] == built[0] and here >= built):
        return
    version, major = format_version(built), built[0]
    raise FingerprintError(
        f"the engine {manifest.name} was built by another TensorRT",
        expected=f"{version} or a later {major}" if compatible else version,
        found=format_version(here),
        fix=f"install TensorRT {version} (`pip install tensorrt=={version}.*`), or build it with\n"
        f"this one: {rebuild(manifest)}"
        + (
            ""
            if compatible
            else "; engines built with\nversion_compatible=true and exclude_lean_runtime=false run "
            f"on later releases of TensorRT {major} too"
        ),
    )


def check_gpu(manifest: Engine, built: Gpu, here: Gpu, compatibility: str) -> None:
    """Compare GPUs: a plan is for one model, unless it was built to be compatible with more.

    Raises:
        FingerprintError: the plan does not run here.
    """
    if compatibility == "ampere_plus":
        if float(here.capability) >= 8.0:
            return
        expected = "compute capability 8.0 or later"
    elif compatibility == "same_compute_capability":
        if here.capability == built.capability:
            return
        expected = f"compute capability {built.capability}"
    else:
        if here == built:
            return
        expected = str(built)
    raise foreign_gpu(manifest, expected, here)


def load(folder: Path, manifest: Engine, device: str, *, cuda_graph: bool = False) -> nn.Module:
    """Return the engine as a module on a GPU, in the order of PyTorch's current stream.

    A stripped engine is given the weights of its bundle.

    Raises:
        BuildError: the runtime refused the plan, or the plan the weights.
    """
    from diffusion_engines.backends.nvidia.refitting import refit_at_load
    from diffusion_engines.backends.nvidia.running import load_plan

    trt = library()
    return load_plan(
        trt,
        folder / manifest.engine,
        manifest.name,
        device,
        cuda_graph=cuda_graph,
        host_code=recorded(manifest, "settings", "build.version_compatible", bool),
        prepare=refit_at_load(trt, folder, manifest),
    )
