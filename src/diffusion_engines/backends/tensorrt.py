"""TensorRT: engines for data-centre and other NVIDIA GPUs, built on the GPU that runs them.

Built by ``trtexec`` where it is on PATH, else by TensorRT's Python builder with the same settings.
TensorRT 8.6, 9, 10 and 11. An engine belongs to one release of TensorRT and one GPU model, unless
conf/build/tensorrt.yaml says otherwise.
https://docs.nvidia.com/deeplearning/tensorrt/latest/
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.backends import BuildResult, check_dtypes, require
from diffusion_engines.backends.gpus import Gpu, driver_branch, find_gpu
from diffusion_engines.backends.plans.building import (
    add_profile,
    last_messages,
    parse_graph,
    recording_logger,
    write_plan,
)
from diffusion_engines.backends.plans.layers import LAYERS, precisions_of_graph, read_layers
from diffusion_engines.backends.plans.timing import TIMING_CACHE, check_timing_cache
from diffusion_engines.backends.plans.trtexec import (
    ALWAYS_STRONGLY_TYPED,
    OLDEST,
    STRONGLY_TYPED,
    Version,
    check_supported,
    find_trtexec,
    format_version,
    parse_version,
    trtexec_command,
)
from diffusion_engines.backends.preflight import (
    check_platform,
    foreign_gpu,
    platform_name,
    rebuild,
    recorded,
    require_gpu,
)
from diffusion_engines.config import TensorRTBuild, TensorRTTarget
from diffusion_engines.errors import BuildError, FingerprintError, HardwareError
from diffusion_engines.processes import run_logged

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "fp16", "bf16", "fp16-mixed", "fp8", "int8")
ENGINE = "engine.plan"
_INSTALL = "pip install tensorrt"
_HARDWARE = {"same_compute_capability": "SAME_COMPUTE_CAPABILITY", "ampere_plus": "AMPERE_PLUS"}


def fingerprint(target: TensorRTTarget) -> dict[str, Any]:
    """Return what an engine depends on: TensorRT, CUDA, the driver's branch, the GPU.

    Raises:
        HardwareError: TensorRT or its GPU is not here.
    """
    gpu = find_gpu()
    wanted = f"{target.gpu}, compute capability {target.compute_capability}"
    if gpu is None or gpu.capability != target.compute_capability or not gpu.is_a(target.gpu):
        raise HardwareError(
            f"TensorRT builds for the GPU that it runs on, and this is not the {target.gpu} of the "
            "target",
            expected=wanted,
            found=str(gpu) if gpu else "no GPU that PyTorch sees",
            fix="run this on such a machine; in a container, start it with `--gpus all`",
        )
    import torch

    return {
        "tensorrt": format_version(_builder_version(find_trtexec())),
        "cuda": torch.version.cuda,
        "driver": driver_branch(),
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "platform": platform_name(),
    }


def wrap_fingerprint(target: TensorRTTarget) -> dict[str, Any]:
    """Return what the TorchScript file depends on; nothing where none is asked for.

    Raises:
        HardwareError: torch-tensorrt is missing.
    """
    from diffusion_engines.backends.plans import torchscript

    return torchscript.wrap_fingerprint("tensorrt", target.torchscript)


def _builder_version(trtexec: tuple[Path, Version] | None) -> Version:
    version = trtexec[1] if trtexec else parse_version(_tensorrt().__version__)
    if version < OLDEST:
        raise HardwareError(
            "this TensorRT is too old",
            expected=f"{format_version(OLDEST)} or later",
            found=format_version(version),
            fix="install a later TensorRT",
        )
    return version


def _tensorrt() -> Any:
    trt = require("tensorrt", _INSTALL)
    if not hasattr(trt, "Builder"):
        raise HardwareError(
            "the package tensorrt is here without the library",
            expected="the bindings and libnvinfer",
            found=f"{trt.__name__} at {getattr(trt, '__file__', None)}",
            fix="install TensorRT from NVIDIA, or use one of NVIDIA's containers",
        )
    return trt


def build(
    onnx: Path,
    folder: Path,
    target: TensorRTTarget,
    inputs: list[dict[str, Any]],
    precision: str,
    timing_cache: Path | None = None,
) -> BuildResult:
    """Build ``engine.plan`` from a graph, with its layer information and timing cache.

    From TensorRT 10 on the network is strongly typed: each layer runs in the precision that the
    graph says. Before, the builder chooses among the precisions allowed. What came of it is read
    from the engine's layer information.

    Args:
        onnx: the graph.
        folder: gets the engine, ``layers.json`` and, where asked for, ``timing.cache``.
        target: builder settings.
        inputs: name and shape of each input; open dimensions as ``{size, min, max}``.
        precision: that most layers must have.
        timing_cache: of an earlier build with the same fingerprint, if there is one.

    Raises:
        BuildError: TensorRT refused the graph, failed or crashed, or runs it in another precision.
    """
    if target.build.timing_cache and timing_cache is not None and timing_cache.is_file():
        (folder / TIMING_CACHE).write_bytes(timing_cache.read_bytes())
    found = find_trtexec()
    version = _builder_version(found)
    settings = target.build
    if found:
        log = _build_with_trtexec(found[0], version, onnx, folder, settings, inputs, precision)
        builder = f"trtexec {format_version(version)}"
    else:
        trt = _tensorrt()
        log = build_with_python(trt, version, onnx, folder, settings, inputs, precision)
        builder = f"tensorrt {trt.__version__} (Python builder)"
    path = folder / ENGINE
    if not path.is_file() or path.stat().st_size == 0:
        raise BuildError(
            f"{builder} wrote no engine of {onnx}",
            expected=str(path),
            found="an empty file" if path.is_file() else "nothing",
            fix="free some disk space; the log ends with:\n" + log[-800:],
        )
    layers, precisions = read_layers(folder / LAYERS)
    check_precision_of_engine(onnx, version, settings, precision, precisions)
    if settings.timing_cache:
        check_timing_cache(folder / TIMING_CACHE, builder)
    return BuildResult(ENGINE, builder, f"built by {builder}\n{log}", layers, precisions)


def check_precision_of_engine(
    onnx: Path,
    version: Version,
    build: TensorRTBuild,
    precision: str,
    precisions: dict[str, int],
) -> None:
    """Compare the dtypes of an engine's layers with the precision asked for.

    Raises:
        BuildError: most layers have another one, or the engine does not tell.
    """
    if precisions:
        check_dtypes(onnx, precision, precisions)
    elif version >= STRONGLY_TYPED:
        # Names alone. A strongly typed engine has the precisions of its graph.
        check_dtypes(onnx, precision, precisions_of_graph(onnx))
    else:
        raise BuildError(
            f"TensorRT {format_version(version)} chose the precisions of {onnx} and does not tell",
            expected="layer information with dtypes",
            found=f"profiling_verbosity {build.profiling_verbosity}",
            fix="set targets.*.build.profiling_verbosity=detailed (conf/build/tensorrt.yaml)",
        )


def _build_with_trtexec(
    trtexec: Path,
    version: Version,
    onnx: Path,
    folder: Path,
    build: TensorRTBuild,
    inputs: list[dict[str, Any]],
    precision: str,
) -> str:
    command = trtexec_command(
        trtexec,
        version,
        onnx=onnx,
        plan=folder / ENGINE,
        layers=folder / LAYERS,
        timing_cache=folder / TIMING_CACHE if build.timing_cache else None,
        inputs=inputs,
        precision=precision,
        build=build,
    )
    path = folder / "trtexec.log"
    log = run_logged(
        command,
        path,
        what=f"trtexec {format_version(version)}, building {onnx}",
        fix="its message above names the layer or the option; more GPU memory is the other usual\n"
        "cause (targets.*.build.workspace_mib limits it)",
    )
    path.unlink()
    return log


def build_with_python(
    trt: Any,
    version: Version,
    onnx: Path,
    folder: Path,
    build: TensorRTBuild,
    inputs: list[dict[str, Any]],
    precision: str,
) -> str:
    """Build with the Python API, as :func:`trtexec_command` would; return the log.

    Raises:
        BuildError: TensorRT refused the graph, or failed.
    """
    check_supported(build, precision, version)
    library = f"TensorRT {trt.__version__}"
    logger = recording_logger(trt)
    builder, network = parse_graph(trt, library, onnx, logger, _network_flags(trt, version))
    config = builder.create_builder_config()
    cache = apply_settings(trt, config, build, folder / TIMING_CACHE)
    if version < STRONGLY_TYPED and precision != "fp32":
        config.set_flag(getattr(trt.BuilderFlag, precision.upper()))
    add_profile(builder, config, inputs)
    write_plan(trt, library, builder, network, config, folder / ENGINE, logger, onnx)
    if cache is not None:
        (folder / TIMING_CACHE).write_bytes(config.get_timing_cache().serialize())
    _write_layers(trt, logger, folder, build)
    return "\n".join(logger.lines)


def _network_flags(trt: Any, version: Version) -> int:
    if version >= ALWAYS_STRONGLY_TYPED:
        return 0
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED if version >= STRONGLY_TYPED else flags.EXPLICIT_BATCH)


def apply_settings(trt: Any, config: Any, build: TensorRTBuild, timing_cache: Path) -> Any:
    """Set a builder config to conf/build/tensorrt.yaml; return its timing cache, if it has one."""
    config.builder_optimization_level = build.optimization_level
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, build.profiling_verbosity.upper())
    if build.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace_mib << 20)
    if build.max_aux_streams is not None:
        config.max_aux_streams = build.max_aux_streams
    if build.hardware_compatibility != "none":
        config.hardware_compatibility_level = getattr(
            trt.HardwareCompatibilityLevel, _HARDWARE[build.hardware_compatibility]
        )
    flags = trt.BuilderFlag
    if not build.tf32:
        config.clear_flag(flags.TF32)  # the builder has it on
    if build.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if build.exclude_lean_runtime:
        config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)
    if build.weights == "refittable":
        config.set_flag(flags.REFIT)
    elif build.weights == "stripped":
        # What trtexec's --stripWeights sets: to be refitted with the same weights.
        config.set_flag(flags.STRIP_PLAN)
        config.set_flag(flags.REFIT_IDENTICAL)
    if not build.timing_cache:
        config.set_flag(flags.DISABLE_TIMING_CACHE)
        return None
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _write_layers(trt: Any, logger: Any, folder: Path, build: TensorRTBuild) -> None:
    runtime = trt.Runtime(logger)
    if build.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
    if engine is None:
        raise BuildError(
            "TensorRT cannot load the engine that it has just built",
            found=last_messages(logger),
            fix="the log above says why; GPU memory is the usual cause",
        )
    inspector = engine.create_engine_inspector()
    (folder / LAYERS).write_text(
        inspector.get_engine_information(trt.LayerInformationFormat.JSON) + "\n"
    )


def check_loadable(manifest: dict[str, Any]) -> None:
    """Compare an engine's fingerprint with this machine, before TensorRT sees the engine.

    Raises:
        IntegrityError: the manifest has no complete fingerprint.
        HardwareError: the library or a GPU is missing.
        FingerprintError: another TensorRT, platform or GPU than the engine's.
    """
    built = parse_version(recorded(manifest, "fingerprint", "tensorrt"))
    build = recorded(manifest, "settings", "build")
    capability = recorded(manifest, "fingerprint", "compute_capability")
    name = recorded(manifest, "fingerprint", "gpu")
    check_platform(manifest)
    here = parse_version(_tensorrt().__version__)
    check_version(manifest, built, here, compatible=build["version_compatible"])
    gpu = require_gpu(manifest, f"{name}, compute capability {capability}")
    check_gpu(manifest, Gpu(name, capability), gpu, build["hardware_compatibility"])


def check_version(
    manifest: dict[str, Any], built: Version, here: Version, *, compatible: bool
) -> None:
    """Compare releases: a plan is for one, a version-compatible one also for later minor ones.

    Raises:
        FingerprintError: this release does not run the plan.
    """
    if here == built or (compatible and here[0] == built[0] and here >= built):
        return
    version, major = format_version(built), built[0]
    raise FingerprintError(
        f"the engine {manifest['name']} was built by another TensorRT",
        expected=f"{version} or a later {major}" if compatible else version,
        found=format_version(here),
        fix=f"install TensorRT {version} (`pip install tensorrt=={version}.*`), or build it with\n"
        f"this one: {rebuild(manifest)}"
        + (
            ""
            if compatible
            else "; engines built with version_compatible=true also run\non later "
            f"releases of TensorRT {major}"
        ),
    )


def check_gpu(manifest: dict[str, Any], built: Gpu, here: Gpu, compatibility: str) -> None:
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


def wrap(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the TorchScript file where the target asks for one; return what loading it depends on.

    Raises:
        as :func:`check_loadable` and ``torchscript.wrap_plan``.
    """
    from diffusion_engines.backends.plans import torchscript

    if not recorded(manifest, "settings", "torchscript"):
        return {}
    check_loadable(manifest)
    return torchscript.wrap_plan(folder, manifest, "tensorrt")


def load(
    folder: Path, manifest: dict[str, Any], device: str, *, cuda_graph: bool = False
) -> nn.Module:
    """Return the engine as a module on a GPU, running on PyTorch's current stream.

    A stripped engine gets its weights from the graph that it was built from.

    Raises:
        IntegrityError: a stripped engine's graph is missing or is another one.
    """
    from diffusion_engines.backends.plans.running import load_plan

    trt = _tensorrt()
    build = manifest["settings"]["build"]
    prepare = None
    if build["weights"] == "stripped":
        from diffusion_engines.backends.plans.refitting import refit_from_graph

        prepare = refit_from_graph(trt, manifest)
    return load_plan(
        trt,
        folder / manifest["engine"],
        manifest["name"],
        device,
        cuda_graph=cuda_graph,
        host_code=build["version_compatible"],
        prepare=prepare,
    )
