"""Compile a program to a shared library, and say which weights it takes in which layout."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from diffusion_engines.backends.base import BuildResult, Graph
from diffusion_engines.backends.inductor.building.compiler import find_compiler, variables
from diffusion_engines.backends.inductor.building.fusion import fuse_linears
from diffusion_engines.backends.inductor.building.packaging import (
    compile_program,
    constants_of_package,
)
from diffusion_engines.backends.inductor.building.tuning import tuned_convolutions
from diffusion_engines.backends.inductor.settings import (
    ENGINE,
    LAYOUT,
    InductorTarget,
    keeps_timings,
)
from diffusion_engines.backends.timing import TIMING_CACHE
from diffusion_engines.errors import BuildError
from diffusion_engines.files import write_json
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.programs.reading import CONSTANTS, read_program


def build(
    graph: Graph, folder: Path, target: InductorTarget, timing_cache: Path | None = None
) -> BuildResult:
    """Compile a program and write ``engine.so`` and ``weights.json``, and its constants if any.

    Where a target's kernels are timed, also ``timing.cache``, with what ``timing_cache`` of an
    earlier build has.

    Raises:
        BuildError: the compiler failed, or took values of weights for granted.
        HardwareError: there is no C++ compiler that works.
    """
    compiler = find_compiler(target.device)
    os.environ.update(variables(compiler))  # for Triton and nvcc, in processes of their own too
    program = read_program(graph.folder, channels_last=target.build.channels_last)
    fused = fuse_linears(program)
    layout = {
        name: _described(value) | ({"parts": fused[name]} if name in fused else {})
        for name, value in program.state_dict.items()
    }
    if target.device == "cuda":
        program = move_to_device_pass(program, "cuda")
    options: dict[str, Any] = {"cpp.cxx": (None, compiler.path)}
    with contextlib.ExitStack() as stack:
        if keeps_timings(target):
            kept = stack.enter_context(tuned_convolutions(graph.path, timing_cache))
        layers = compile_program(program, folder / ENGINE, target.device, options)
        if keeps_timings(target):
            (folder / TIMING_CACHE).write_bytes(kept.read_bytes())
    taken = constants_of_package(folder / ENGINE, target.device)
    if lost := sorted({*layout} - taken):
        raise BuildError(
            f"PyTorch's compiler took {len(lost)} weight(s) of {graph.name} for constants",
            expected="every weight as an input of the library",
            found=", ".join(lost[:5]),
            fix="report it; another version of PyTorch may not",
        )
    write_json(folder / LAYOUT, layout)
    if (constants := graph.folder / CONSTANTS).is_file():
        (folder / CONSTANTS).write_bytes(constants.read_bytes())
    of_torch = {p.torch_dtype: p.name for p in PRECISIONS.values() if p.name == p.dtype}
    dtypes: Counter[str] = Counter()
    for name, weight in layout.items():
        dtypes[of_torch[weight["dtype"]]] += len(fused.get(name, [name]))
    builder = f"inductor of torch {torch.__version__}"
    return BuildResult(ENGINE, builder, _log(layers, options), layers, dict(dtypes))


def _described(weight: torch.Tensor) -> dict[str, Any]:
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": [*weight.shape],
        "stride": [*weight.stride()],
    }


def _log(layers: Mapping[str, int], options: Mapping[str, Any]) -> str:
    calls = "\n".join(f"  {count:6d}  {name}" for name, count in sorted(layers.items()))
    return f"options: {options}\ncalls, by operator:\n{calls}"
