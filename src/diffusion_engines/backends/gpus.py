"""GPUs by name and compute capability: which one is here, and which targets are for which.

https://developer.nvidia.com/cuda-gpus
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from diffusion_engines.errors import HardwareError
from diffusion_engines.precisions import PRECISIONS

# Of the GPUs that conf/target/ names. `tests/unit/backends/test_gpus.py` compares the two.
CAPABILITIES = {"A10": "8.6", "L4": "8.9", "A100": "8.0", "H100": "9.0", "H200": "9.0"}
# The targets that build for the GPUs of a compute capability with TensorRT-RTX.
RTX_TARGETS = {"8.6": ("rtx",), "8.9": ("rtx40", "rtx"), "12.0": ("rtx50", "rtx")}


@dataclass(frozen=True)
class Gpu:
    """The GPU that PyTorch uses: the driver's name for it, and "major.minor"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}"

    def is_a(self, word: str) -> bool:
        """Whether the name has a word: "NVIDIA A10" is an A10, "NVIDIA A100-SXM4-40GB" is not."""
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", self.name) is not None


def find_gpu() -> Gpu | None:
    """Return the GPU that PyTorch uses, if it sees one."""
    import torch

    if not torch.cuda.is_available():
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return Gpu(torch.cuda.get_device_name(), capability)


def any_gpu() -> Gpu:
    """Return the GPU that PyTorch uses.

    Raises:
        HardwareError: it sees none.
    """
    gpu = find_gpu()
    if gpu is None:
        raise HardwareError(
            "no CUDA GPU",
            expected="a GPU that PyTorch sees",
            found="none",
            fix="check nvidia-smi; in a container, start it with `--gpus all`",
        )
    return gpu


def driver_branch() -> str:
    """Return the first number of the driver's version, e.g. ``575``.

    Raises:
        HardwareError: nvidia-smi, which comes with the driver, does not run.
    """
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=60
        ).stdout
        return output.split(".", 1)[0].strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise HardwareError(
            "the driver's version cannot be found",
            expected="`nvidia-smi` prints it",
            found=str(error),
            fix="install the driver; in a container, start it with `--gpus all`",
        ) from error


def targets_for(gpu: Gpu) -> str:
    """Say which targets of conf/target/ build engines for a GPU."""
    named = [word.lower() for word in CAPABILITIES if gpu.is_a(word)]
    targets = [*named, *RTX_TARGETS.get(gpu.capability, ())]
    if targets:
        return f"build for this GPU: target {' or '.join(targets)} (conf/target/)"
    return (
        f"no target in conf/target/ is for a {gpu.name}: copy a10.yaml there and set\n"
        f"compute_capability '{gpu.capability}', or take the backend onnxruntime"
    )


def lacking(capability: str, precisions: Collection[str]) -> list[str]:
    """Say which precisions the GPUs of a compute capability have no tensor cores for."""
    return [
        f"{name} needs compute capability {since} or later, found {capability}"
        for name in sorted(precisions)
        if float(capability) < (since := PRECISIONS[name].capability)
    ]
