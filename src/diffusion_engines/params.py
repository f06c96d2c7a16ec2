"""What a stage reads of params.yaml, declared once: in the dataclass ``Config`` of its script.

Each field names a key of params.yaml as dvc.yaml does, with ``${key}`` for the item that the stage
works on and ``${item.…}`` for a value of that item. A stage gets these values and nothing else, so
that it cannot depend on a parameter that dvc.yaml does not track
(``tests/pipeline/test_dvc_yaml.py`` compares the two, key by key)::

    @dataclass(frozen=True)
    class Config:
        engine: str = key("engines")  # given as `+engine=rtx-unet`
        item: config.Engine = param("engines.${key}")
        target: config.Target = param("targets.${item.target}")
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from diffusion_engines.config import values_from_config
from diffusion_engines.errors import ConfigError

# Every section, as plain data that nobody has checked: what the stage check_conf reads.
EVERYTHING = "params.yaml"
_TABLE, _PATH = "table", "path"


def key(table: str) -> Any:
    """Declare the argument of a stage's command line that picks an item of a table."""
    return dataclasses.field(metadata={_TABLE: table})


def param(path: str) -> Any:
    """Declare a key of params.yaml that a stage reads; :data:`EVERYTHING` is all of it."""
    return dataclasses.field(metadata={_PATH: path})


def selector(config_class: type[Any]) -> tuple[str, str] | None:
    """Return the argument that picks a stage's item, and the table that has the items."""
    for field in dataclasses.fields(config_class):
        if _TABLE in field.metadata:
            return field.name, field.metadata[_TABLE]
    return None


def tracked(config_class: type[Any]) -> list[str]:
    """Return the keys that a stage reads, as dvc.yaml writes them."""
    return [f.metadata[_PATH] for f in dataclasses.fields(config_class) if _PATH in f.metadata]


def slices(config_class: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stage reads of a composed config, by full key, as plain data.

    A key that is not there is left out.

    Raises:
        ConfigError: the selector is missing or names nothing that exists.
    """
    chosen = _chosen(config_class, config)
    found: dict[str, Any] = {}
    for template in tracked(config_class):
        if template == EVERYTHING:
            found |= {section: config[section] for section in config}
            continue
        path = _resolved(template, chosen)
        value: Any = config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[path] = value
    return found


@dataclasses.dataclass(frozen=True)
class Difference:
    """A value that was another one before; None stands for none too."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.after}"


def differences(key: str, before: Any, after: Any) -> list[Difference]:
    """Return the values in which two mappings differ, by their full keys, below ``key``."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = dict.fromkeys([*before, *after])
        return [
            change
            for name in names
            for change in differences(f"{key}.{name}", before.get(name), after.get(name))
        ]
    return [] if before == after else [Difference(key, before, after)]


def config_from_mapping(config_class: type[Any], config: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a stage's typed config and the key of the item that it works on, "" where none is.

    Raises:
        ConfigError: a value is wrong or missing, the selector is missing or names nothing.
    """
    types = typing.get_type_hints(config_class, include_extras=True)
    chosen = _chosen(config_class, config)
    values: dict[str, Any] = {}
    wanted: dict[str, tuple[str, Any]] = {}
    for field in dataclasses.fields(config_class):
        if _TABLE in field.metadata:
            values[field.name] = chosen[0]
        elif field.metadata[_PATH] == EVERYTHING:
            values[field.name] = config
        else:
            wanted[field.name] = (_resolved(field.metadata[_PATH], chosen), types[field.name])
    return config_class(**values, **values_from_config(config, wanted)), chosen[0]


def _chosen(config_class: type[Any], config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the key of a stage's item, and the item."""
    picked = selector(config_class)
    if picked is None:
        return "", {}
    name, table = picked
    given, known = config.get(name), config.get(table, {})
    if given not in known:
        raise ConfigError(
            f"no such {name}: {given}" if given else f"which {name}?",
            expected=f"+{name}= one of: {', '.join(sorted(known)) or f'nothing: {table} is empty'}",
            found=f"+{name}={given}" if given else "nothing",
            fix=f"choose one of these, or add it to conf/fleet/ ({table})",
        )
    return str(given), known[given]


def _resolved(template: str, chosen: tuple[str, Mapping[str, Any]]) -> str:
    given, item = chosen

    def value(match: re.Match[str]) -> str:
        name = match[1]
        return given if name == "key" else str(item[name.removeprefix("item.")])

    return re.sub(r"\$\{([^}]+)\}", value, template)
