"""Targets as typed values: each is checked by the schema of the backend that it names."""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any

from pydantic import PlainValidator, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from diffusion_engines.backends import backend, backend_names, base, is_backend
from diffusion_engines.backends.preflight import rebuild, recorded
from diffusion_engines.errors import IntegrityError
from diffusion_engines.manifests import Engine


def target_from_settings(settings: object) -> base.Target:
    """Return the target that a mapping of settings describes, such as one of params.yaml.

    Raises:
        ValidationError: of pydantic: an unknown key, a wrong type, no backend or an unknown one.
    """
    values = TypeAdapter(dict[str, Any]).validate_python(settings)
    if "backend" not in values:
        raise _problem("missing", values)
    if not is_backend(name := values["backend"]):
        text = f"no such backend, there are {', '.join(backend_names())}"
        raise _problem(PydanticCustomError("unknown_backend", "{text}", {"text": text}), name)
    # As JSON: strict, yet it lets mappings be dataclasses.
    return _adapter(name).validate_json(json.dumps(values, default=str))


def _problem(kind: str | PydanticCustomError, found: object) -> ValidationError:
    details = InitErrorDetails(type=kind, loc=("backend",), input=found)
    return ValidationError.from_exception_data("target", [details])


@functools.cache
def _adapter(name: str) -> TypeAdapter[base.Target]:
    return TypeAdapter(backend(name).settings)


# A field of the configuration that holds a target of any backend.
Target = Annotated[base.Target, PlainValidator(target_from_settings)]


def device_of(target: base.Target) -> str:
    """Return the PyTorch device on which the engines of a target run."""
    return backend(target.backend).device(target)


def device_of_engine(manifest: Engine) -> str:
    """Return the PyTorch device that an engine was built for: ``cpu`` or ``cuda``.

    Raises:
        IntegrityError: the manifest's settings are not those of a target.
    """
    try:
        return device_of(target_from_settings(manifest.settings))
    except ValidationError as error:
        raise IntegrityError(
            f"the manifest of {manifest.name} has other settings than a target "
            "of this version of diffusion-engines",
            found=str(error),
            fix=f"build it again: {rebuild(manifest)}",
        ) from error


def recorded_device(manifest: Engine) -> str:
    """Return the device in an engine's fingerprint.

    Raises:
        IntegrityError: there is none, or it is another than that of its settings.
    """
    device = recorded(manifest, "fingerprint", "device", str)
    if device != (target := device_of_engine(manifest)):
        raise IntegrityError(
            f"the manifest of {manifest.name} contradicts itself",
            expected=f"a fingerprint of the target's device, {target}",
            found=device,
            fix=f"build it again: {rebuild(manifest)}",
        )
    return device
