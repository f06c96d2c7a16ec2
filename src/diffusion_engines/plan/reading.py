"""Read dvc.lock as DVC does, several times as fast: of 200 engines it has 70,000 lines.

DVC reads YAML 1.2 in pure Python (ruamel.yaml). libyaml, by PyYAML, is YAML 1.1, for which 1e-05 is
a text and `on` is true; with ruamel's own rules for plain scalars the two read the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml


def parse_yaml_12(text: str) -> Any:
    """Return the content of a YAML 1.2 document.

    Raises:
        yaml.YAMLError: it is none.
    """
    from ruamel.yaml.resolver import implicit_resolvers

    class Loader(yaml.CSafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    for versions, tag, pattern, first in implicit_resolvers:
        if (1, 2) in versions:
            Loader.add_implicit_resolver(tag, pattern, first)
    return yaml.load(text, Loader)  # noqa: S506 - a safe loader with other rules for scalars


@contextmanager
def fast_lock() -> Iterator[None]:
    """Have DVC read its lock by :func:`parse_yaml_12`."""
    from dvc.utils import strictyaml

    plain = strictyaml.parse_yaml

    def parse(text: str, path: str, typ: str = "safe") -> Any:
        if typ == "safe" and str(path).endswith(".lock"):
            try:
                return parse_yaml_12(text) or {}
            except yaml.YAMLError:
                pass  # DVC has its own words for it
        return plain(text, path, typ)

    strictyaml.parse_yaml = parse
    try:
        yield
    finally:
        strictyaml.parse_yaml = plain
