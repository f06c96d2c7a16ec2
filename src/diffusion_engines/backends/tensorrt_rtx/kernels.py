"""What TensorRT-RTX compiles for the GPU that an engine runs on, kept for the next time.

An engine is compiled to its end when it first runs somewhere, which takes seconds to minutes; the
library puts the kernels into a cache, which is kept per version, GPU, driver and engine in the
user's folder for caches. DVC has nothing to do with it: it follows from the engine and the machine.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from diffusion_engines.backends.gpus import Gpu, driver_branch, find_gpu
from diffusion_engines.backends.nvidia.running import Contexts
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import new_file
from diffusion_engines.manifests import Bundle


def kernels_path(version: str, gpu: Gpu, driver: str, digest: str) -> Path:
    """Return where the kernels of an engine are kept.

    Args:
        version: of TensorRT-RTX.
        gpu: that they are compiled for.
        driver: its branch.
        digest: SHA-256 of the plan.
    """
    machine = re.sub(r"\W+", "-", f"{gpu.name} {gpu.capability} {driver}")
    folder = platformdirs.user_cache_path("diffusion-engines") / "tensorrt-rtx"
    return folder / version / machine / digest


def kernels_of(trt: Any, manifest: Bundle) -> Path | None:
    """Return where the kernels of a bundle's engine are kept on this machine, None for nowhere."""
    gpu = find_gpu()
    try:
        driver = driver_branch()
    except HardwareError:  # a container without nvidia-smi: nothing tells drivers apart
        return None
    if gpu is None:
        return None
    return kernels_path(trt.__version__, gpu, driver, manifest.files[manifest.engine].sha256)


def contexts_with_kernels(
    trt: Any, kernels: Path | None, *, cuda_graph: bool
) -> Callable[[Any], Contexts]:
    """Return how contexts of an engine are made: with kernels that were compiled before.

    Args:
        trt: the Python module.
        kernels: read where it exists, and written once new shapes have run; None: not kept.
        cuda_graph: let the library record and replay CUDA graphs. It knows when its kernels change.
    """
    return functools.partial(_contexts, trt, kernels, cuda_graph)


def _contexts(trt: Any, kernels: Path | None, cuda_graph: bool, engine: Any) -> Contexts:
    config = engine.create_runtime_config()
    if cuda_graph:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    # Compiled before the first run ends, so that they are in the cache by then, and so that every
    # run of some shapes takes the same kernels.
    strategy = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
    cache = config.create_runtime_cache()
    # False for what another version or GPU wrote: it says so in its log, and compiles anew.
    known = bool(kernels and kernels.is_file() and cache.deserialize(kernels.read_bytes()))
    config.set_runtime_cache(cache)
    size = kernels.stat().st_size if kernels and known else 0

    def keep() -> None:
        nonlocal size
        content = bytes(cache.serialize())
        if kernels and len(content) != size:
            size = len(content)
            _write(kernels, content)

    return Contexts(lambda: engine.create_execution_context(config), cuda_graph, keep)


def _write(path: Path, content: bytes) -> None:
    try:
        with new_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:  # the engine runs all the same, and is compiled again next time
        warnings.warn(f"compiled kernels are not kept: {error}", stacklevel=2)
