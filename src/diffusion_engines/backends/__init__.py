"""What builds and runs engines: one package per backend, found and imported when it is asked for.

A package of this folder that declares ``BACKEND`` is a backend (``base.Backend`` says what that
is); so is what others register as an entry point of the group ``diffusion_engines.backends``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from importlib import metadata
from typing import Any, cast

from diffusion_engines.backends.base import Backend, Target
from diffusion_engines.errors import BuildError, ConfigError, HardwareError

ENTRY_POINTS = "diffusion_engines.backends"


def backend(name: str) -> Backend[Target]:
    """Return a backend by its name.

    Its methods take the targets of its own schema: those whose ``backend`` is this name.

    Raises:
        ConfigError: there is no such backend, or a third party's cannot be imported.
    """
    if name in (own := _own_backends()):
        return own[name]
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=name):
        return _third_party(entry)
    raise ConfigError(f"no such backend: {name}", expected=", ".join(backend_names()), found=name)


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, third parties' included."""
    others = {entry.name for entry in metadata.entry_points(group=ENTRY_POINTS)}
    return tuple(sorted({*_own_backends(), *others}))


def is_backend(name: str) -> bool:
    """Whether there is a backend of this name."""
    # Reading what is installed takes 15 ms, and a fleet has many targets.
    return name in _own_backends() or name in backend_names()


@functools.cache
def _own_backends() -> Mapping[str, Backend[Target]]:
    packages = (
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
        if found.ispkg
    )
    declared = (package.BACKEND for package in packages if hasattr(package, "BACKEND"))
    return {found.name: found for found in declared}


def _third_party(entry: metadata.EntryPoint) -> Backend[Target]:
    package = entry.dist.name if entry.dist else entry.module
    version = entry.dist.version if entry.dist else "unknown"
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the backend {entry.name} of {package} {version} cannot be imported",
            expected=f"{entry.value}, as its entry point says",
            found=f"{type(error).__name__}: {error}",
            fix=f"install {package} again, or another version of it",
        ) from error
    return cast("Backend[Target]", _ThirdParty(found, package, version))


class _ThirdParty:
    """A backend whose code is not in this repository: its version is a part of fingerprints."""

    def __init__(self, found: Backend[Target], package: str, version: str) -> None:
        self._found = found
        self._package = {"package": package, "package_version": version}

    def __getattr__(self, name: str) -> object:
        return getattr(self._found, name)

    def fingerprint(self, target: Target) -> Mapping[str, object]:
        return {**self._found.fingerprint(target), **self._package}


def require(module: str, install: str) -> Any:
    """Import an optional library.

    Raises:
        HardwareError: it is not installed, or one of its own libraries is missing; says how to
            install it.
    """
    if importlib.util.find_spec(module) is None:
        raise HardwareError(
            f"the library {module} is not installed here",
            expected=f"an importable {module}",
            found="nothing of that name",
            fix=f"`{install}`; or take engines that others built: `dvc pull`",
        )
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # the bindings without the library that they bind
        raise HardwareError(
            f"the library {module} cannot be loaded here",
            expected=f"an importable {module}",
            found=f"{type(error).__name__}: {error}",
            fix=f"`{install}` again, or use one of NVIDIA's containers",
        ) from error


def check_precision(name: str, precision: str, backend_name: str) -> None:
    """Raise BuildError where a backend does not have the precision of an engine."""
    if precision not in (known := backend(backend_name).precisions):
        raise BuildError(
            f"engines.{name}.precision: the backend {backend_name} has no {precision}",
            expected=", ".join(known),
            found=precision,
            fix="choose another precision in conf/fleet/, or another target",
        )
