"""The kinds of pipelines that engines are built for, a module each.

A module of this package that has a ``FAMILY`` is one; so is what an installed package names under
the entry point group ``diffusion_engines.families``, as in ``toy = "toy_package:FAMILY"``. Nothing
here imports torch or diffusers: DVC reads families whenever it composes ``conf/``.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families.base import Family, Role

GROUP = "diffusion_engines.families"


def _declared() -> Iterator[tuple[str, Family]]:
    """Yield where each family is declared, and the family."""
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        if hasattr(module, "FAMILY"):
            yield info.name, module.FAMILY
    for entry in entry_points(group=GROUP):
        yield f"the entry point {entry.name} = {entry.value}", entry.load()


def find_families() -> Mapping[str, Family]:
    """Return the families of this package and of entry points by their class of diffusers.

    Raises:
        ConfigError: two are of one class.
    """
    families: dict[str, Family] = {}
    for where, family in _declared():
        if family.class_name in families:
            raise ConfigError(
                f"two families are of one class, {family.class_name}",
                expected="one",
                found=f"another in {where}",
                fix="uninstall the package that brings one of them",
            )
        families[family.class_name] = family
    return families


FAMILIES: Mapping[str, Family] = find_families()


def family_of(folder: Path) -> Family:
    """Return the family of a diffusers folder, by the classes that its ``model_index.json`` names.

    Raises:
        WeightsError: there is no such file, or it names no class.
        ConfigError: it is of a class that no engines are built for.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder} is no diffusers model folder",
            expected="a model_index.json that names the class of the pipeline",
            found=f"{type(error).__name__}: {error}",
            fix="correct model.folder in conf/model/",
        ) from error
    # Of a pipeline whose code comes with its model, the class is a list.
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{folder} is of a model whose pipeline no engines are built for",
            expected=" or ".join(FAMILIES),
            found=str(name),
            fix="choose another model (conf/model/)",
        )
    return FAMILIES[name].as_in(index)


def role_of(component: str) -> Role | None:
    """Return what a component of this name is for, which is the same in every family that has one.

    None: no family has one.
    """
    for family in FAMILIES.values():
        if component in family.components:
            return family.components[component].role
    return None
