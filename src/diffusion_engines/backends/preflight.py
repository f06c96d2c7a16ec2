"""What a backend asks before it lets a runtime see an engine.

TensorRT answers a foreign engine with an error in its log at best and a crash at worst, so that
everything it could stumble over is compared first. Each check raises with what was expected, what
was found, and what to do.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from diffusion_engines.backends.gpus import Gpu, find_gpu, targets_for
from diffusion_engines.errors import FingerprintError, HardwareError, IntegrityError


def recorded(manifest: Mapping[str, Any], *path: str) -> Any:
    """Return a value of the manifest.

    Raises:
        IntegrityError: it is not there, so that nothing can be compared with it.
    """
    value: Any = manifest
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            raise IntegrityError(
                f"the manifest of {manifest.get('name', 'an engine')} is incomplete",
                expected=".".join(path),
                found="nothing there",
                fix="build and wrap the engine again with this version of diffusion-engines",
            )
        value = value[key]
    return value


def platform_name() -> str:
    """Return e.g. ``linux-x86_64``: plans and native libraries are of one platform."""
    return f"{platform.system()}-{platform.machine()}".lower()


def check_platform(manifest: Mapping[str, Any]) -> None:
    """Raise FingerprintError for an engine of another operating system or processor family."""
    built = recorded(manifest, "fingerprint", "platform")
    if built != (here := platform_name()):
        raise FingerprintError(
            f"the engine {manifest['name']} was built for another platform",
            expected=built,
            found=here,
            fix=f"build it here: {rebuild(manifest)}",
        )


def require_gpu(manifest: Mapping[str, Any], needed: str) -> Gpu:
    """Return the GPU of this machine.

    Raises:
        HardwareError: there is none.
    """
    gpu = find_gpu()
    if gpu is None:
        raise HardwareError(
            f"the engine {manifest['name']} needs an NVIDIA GPU to run",
            expected=needed,
            found="no GPU that PyTorch sees",
            fix="run it on such a GPU; in a container, start it with `--gpus all`",
        )
    return gpu


def foreign_gpu(manifest: Mapping[str, Any], expected: str, gpu: Gpu, hint: str = "") -> Exception:
    """Return the exception for an engine of another GPU."""
    return FingerprintError(
        f"the engine {manifest['name']} was built for another GPU",
        expected=expected,
        found=str(gpu),
        fix=targets_for(gpu) + (f"\n{hint}" if hint else ""),
    )


def rebuild(manifest: Mapping[str, Any]) -> str:
    """Return the command that builds an engine again."""
    return f"`dvc repro build@{manifest['name']}`"
