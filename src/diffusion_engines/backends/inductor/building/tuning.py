"""Convolutions by shape: which kernel is the fastest on this GPU, timed once and kept.

PyTorch's compiler can time cuDNN's convolution beside Triton kernels of its own, and caches what it
found. Which one wins depends on shape and GPU. It is not asked to do so for matrix products: there
it compares its kernels with a call of cuBLAS that first copies the bias, and so takes slower ones
(docs/inductor.md).

What was timed is kept in the user's cache folder until the build is whole: one that is interrupted
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch

from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import read_json, sha256_of_file, write_json

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# While convolutions are lowered. An epilogue is fused into a kernel of Triton's in any case.
_TIMED = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "ATEN,TRITON",
    "max_autotune_conv_backends": "ATEN,TRITON",
    "benchmark_epilogue_fusion": False,
    # By the GPU's clock. By events around a call, the 30 to 60 µs in which the host enqueues cuDNN
    # count as the kernel's, which takes as long: Triton then wins even where it is slower.
    "profile_bandwidth_with_do_bench_using_profiling": True,
}


@contextlib.contextmanager
def tuned_convolutions(program: Path, known: Path | None) -> Iterator[Path]:
    """Within it, the compiler times the convolutions of a program that have not been timed.

    Args:
        program: what is compiled.
        known: what an earlier build found, if there was one.

    Yields:
        the file in which, after compiling, is what was found, now and earlier.
    """
    folder = work_folder(program)
    before = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = str(folder)
    try:
        found = _compilers_file()
        _add(found, [path for path in (known, found) if path is not None and path.is_file()])
        with _convolutions(_timed):
            yield found
    finally:
        if before is None:
            del os.environ[_FOLDER]
        else:
            os.environ[_FOLDER] = before
    shutil.rmtree(folder)


def work_folder(program: Path) -> Path:
    """Return where a program's timings are kept until its build is whole."""
    key = f"{torch.__version__}-{sha256_of_file(program)[:16]}"
    return platformdirs.user_cache_path("diffusion-engines") / "tuning" / key


def _compilers_file() -> Path:
    """Return where Inductor keeps what it timed, under a name made of GPU, CUDA and Triton."""
    cache: Any = importlib.import_module("torch._inductor.codecache").CacheBase
    cache.get_local_cache_path.cache_clear()  # of another folder
    path: Path = cache.get_local_cache_path()
    return path


def _add(path: Path, sources: list[Path]) -> None:
    """Write what files of Inductor's have, together; a damaged one has nothing."""
    cache: Any = importlib.import_module("torch._inductor.codecache").CacheBase
    whole: dict[str, Any] = {}
    for source in sources:
        with contextlib.suppress(IntegrityError, KeyError, TypeError):
            _merge(whole, read_json(source)["cache"])
    write_json(path, {"system": cache.get_system(), "cache": whole})


def _merge(whole: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            _merge(whole[key], value)
        else:
            whole[key] = value


def _timed(lower: Callable[..., Any], x: Any, weight: Any, *rest: Any, **more: Any) -> Any:
    # One of 1×1 is a matrix product.
    edges = [int(edge) for edge in weight.get_size()[2:]]
    if all(edge == 1 for edge in edges):
        return lower(x, weight, *rest, **more)
    patch: Any = importlib.import_module("torch._inductor.config").patch
    with patch(_TIMED):
        return lower(x, weight, *rest, **more)


@contextlib.contextmanager
def _convolutions(around: Callable[..., Any]) -> Iterator[None]:
    """Within it, convolutions are lowered by ``around(lower, …)``."""
    lowerings: dict[Any, Any] = importlib.import_module("torch._inductor.lowering").lowerings
    importlib.import_module("torch._inductor.kernel.conv")  # registers them
    own = {key: lowerings[key] for key in _KEYS if key in lowerings}
    assert own, "PyTorch's compiler lowers no convolutions"
    lowerings.update({key: functools.partial(around, lower) for key, lower in own.items()})
    try:
        yield
    finally:
        lowerings.update(own)


_KEYS = (torch.ops.aten.convolution, torch.ops.aten.convolution.default)
