"""AOTInductor's shared libraries, compiled from a program."""

from __future__ import annotations

import importlib
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.errors import BuildError

# What a package runs, in the wrapper that Inductor writes around it: calls of PyTorch's operators,
# and kernels of its own.
_OPERATOR = re.compile(r"\baoti_torch_(?:cpu|cuda)_(\w+)\(")
_KERNEL = re.compile(r"^\s*(?:call_)?((?:cpp_fused|triton_\w{3}_fused)\w*)\(", re.MULTILINE)

# On a GPU the CPU only launches kernels, and need not be asked for its instruction sets, which
# takes ten runs of the C++ compiler: 54 s on one machine. Kernels go into the library.
_FOR_GPUS: Mapping[str, object] = {
    "cpp.vec_isa_ok": False,
    "aot_inductor.embed_kernel_binary": True,
}
# As many threads as PyTorch has where it runs, and not where it was built.
_FOR_CPUS: Mapping[str, object] = {"cpp.dynamic_threads": True}


def compile_program(
    program: Any, path: Path, device: str, options: Mapping[str, Any]
) -> Mapping[str, int]:
    """Compile an exported program on its device to a shared library without weights.

    Args:
        program: a ``torch.export.ExportedProgram`` with sample inputs.
        path: gets the library.
        device: ``cpu`` or ``cuda``.
        options: of Inductor, besides those that every package has.

    Returns:
        how many kernels and operators it calls, by kind.

    Raises:
        BuildError: Inductor or the C++ compiler failed.
    """
    inductor = importlib.import_module("torch._inductor")
    fixed = {
        "aot_inductor.package_constants_in_so": False,
        # Else biases of up to eight elements become literals: those of the weights at hand.
        "always_keep_tensor_constants": True,
        **(_FOR_GPUS if device == "cuda" else _FOR_CPUS),
    }
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about its own code
        try:
            package = inductor.aoti_compile_and_package(
                program,
                package_path=f"{scratch}/engine.pt2",
                inductor_configs={**fixed, **options},
            )
        except Exception as error:  # of many kinds, none of them public
            raise BuildError(
                "PyTorch's compiler failed",
                found=f"{type(error).__name__}: {str(error)[-1500:]}",
                fix="take another PyTorch, or another backend (conf/target/)",
            ) from error
        with zipfile.ZipFile(package) as archive:
            libraries = [name for name in archive.namelist() if name.endswith(".so")]
            wrappers = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
            if len(libraries) != 1:
                raise BuildError(
                    "PyTorch's compiler wrote something else than one library",
                    expected="one .so",
                    found=", ".join(archive.namelist()),
                )
            path.write_bytes(archive.read(libraries[0]))
            return _calls("".join(archive.read(name).decode() for name in wrappers))


def constants_of_package(path: Path, device: str) -> set[str]:
    """Return the names of the weights and constants that a library takes."""
    aoti: Any = torch._C._aoti
    name = "AOTIModelContainerRunnerCuda" if device == "cuda" else "AOTIModelContainerRunnerCpu"
    runner = getattr(aoti, name)(str(path), 1)
    return set(runner.get_constant_names_to_original_fqns().values())


def _calls(wrapper: str) -> Mapping[str, int]:
    kernels = Counter("kernel" for _ in _KERNEL.finditer(wrapper))
    return dict(kernels + Counter(found[1] for found in _OPERATOR.finditer(wrapper)))
