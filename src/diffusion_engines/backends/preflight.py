"""What a backend asks before it lets a runtime see an engine.

TensorRT answers a foreign engine with an error in its log at best and a crash at worst, so that
everything it could stumble over is compared first. Each check raises with what was expected, what
was found, and what to do.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Literal, TypeVar

from diffusion_engines.backends import gpus
from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.errors import FingerprintError, HardwareError, IntegrityError
from diffusion_engines.manifests import Engine

V = TypeVar("V")


def recorded(
    manifest: Engine,
    section: Literal["fingerprint", "settings", "torchscript"],
    path: str,
    kind: type[V],
) -> V:
    """Return a value that an engine's own backend wrote, e.g. the ``str`` at ``build.weights``.

    Bundles alone have a section ``torchscript``.

    Raises:
        IntegrityError: it is not there, or not of that kind: nothing can be compared with it.
    """
    value: object = getattr(manifest, section)
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, kind):
        raise IntegrityError(
            f"the manifest of {manifest.name} is incomplete",
            expected=f"{section}.{path}: {kind.__name__}",
            found="nothing there" if value is None else repr(value),
            fix="build and wrap the engine again with this version of diffusion-engines",
        )
    return value


def platform_name() -> str:
    """Return e.g. ``linux-x86_64``: plans and native libraries are of one platform."""
    return f"{platform.system()}-{platform.machine()}".lower()


def check_platform(manifest: Engine) -> None:
    """Raise FingerprintError for an engine of another operating system or processor family."""
    built = recorded(manifest, "fingerprint", "platform", str)
    if built != (here := platform_name()):
        raise FingerprintError(
            f"the engine {manifest.name} was built for another platform",
            expected=built,
            found=here,
            fix=f"build it here: {rebuild(manifest)}",
        )


def require_gpu(manifest: Engine, needed: str) -> Gpu:
    """Return the GPU of this machine.

    Raises:
        HardwareError: there is none.
    """
    gpu = gpus.find_gpu()
    if gpu is None:
        raise HardwareError(
            f"the engine {manifest.name} needs an NVIDIA GPU to run",
            expected=needed,
            found="no GPU that PyTorch sees",
            fix="run it on such a GPU; in a container, start it with `--gpus all`",
        )
    return gpu


def foreign_gpu(manifest: Engine, expected: str, gpu: Gpu, hint: str = "") -> Exception:
    """Return the exception for an engine of another GPU."""
    return FingerprintError(
        f"the engine {manifest.name} was built for another GPU",
        expected=expected,
        found=str(gpu),
        fix=gpus.targets_for(gpu) + (f"\n{hint}" if hint else ""),
    )


def rebuild(manifest: Engine) -> str:
    """Return the command that builds an engine again."""
    return f"`dvc repro build@{manifest.name}`"
