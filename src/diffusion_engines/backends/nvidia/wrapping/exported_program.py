"""Wrap a plan as an exported program, which outlives TorchScript: ``engine.pt2``.

PyTorch does not support TorchScript from Python 3.14 on, and torchtrtc goes when it goes. An
exported program that calls the plan is read by ``torch.export.load`` once torch_tensorrt is
imported, and takes the inputs as the TorchScript file does. It also keeps what torchtrtc drops:
that a plan fits other GPUs than the one that it was built on.
https://docs.pytorch.org/TensorRT/user_guide/saving_models.html
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from diffusion_engines.backends.nvidia.wrapping.distribution import install_hint, library_path
from diffusion_engines.families.base import TensorSpec
from diffusion_engines.manifests import Engine
from diffusion_engines.processes import run_logged

if TYPE_CHECKING:
    from torch import nn

PROGRAM = "engine.pt2"
# Writes one in a process of its own: torch_tensorrt loads a GPU's libraries, and may end it.
_WRITER = "diffusion_engines.backends.nvidia.wrapping.writing"
SPECS = TypeAdapter(tuple[TensorSpec, ...])


def write_program(folder: Path, manifest: Engine, backend: str) -> str:
    """Write ``engine.pt2`` beside the plan and run it once; return its name.

    Call it only after the backend's ``check_loadable``.

    Raises:
        BuildError: torch_tensorrt failed or crashed, or PyTorch could not run what it wrote.
    """
    log = folder / "exported_program.log"
    fits = "others" if fits_other_gpus(manifest) else "one"
    files = (folder / manifest.engine, folder / PROGRAM)
    specs = SPECS.dump_json(manifest.inputs).decode()
    run_logged(
        [sys.executable, "-m", _WRITER, backend, fits, *files, specs],
        log,
        what=f"torch_tensorrt, wrapping {manifest.name} as {PROGRAM}",
        fix=f"torch-tensorrt must be for this PyTorch and TensorRT:\n{install_hint(backend)}.\n"
        "Without the file: leave exported_program out of targets.*.wrap",
        env={"LD_LIBRARY_PATH": library_path(backend)},
    )
    log.unlink()
    return PROGRAM


def fits_other_gpus(manifest: Engine) -> bool:
    """Whether a plan may run on other models of GPU than the one that it is wrapped on."""
    if manifest.backend == "tensorrt_rtx":
        return True  # compiled to its end on each
    build = manifest.settings.get("build", {})
    return bool(build.get("hardware_compatibility", "none") != "none")


def load_program(path: Path) -> nn.Module:
    """Load ``engine.pt2`` as any exported program, after the checks."""
    import torch

    importlib.import_module("torch_tensorrt")  # registers what runs the engine
    module: nn.Module = torch.export.load(path).module()
    return module
