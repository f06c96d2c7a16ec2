"""Short arguments for stages run by hand, turned into Hydra's overrides.

``prompt="A leaf, and lemons" target=cpu steps=30`` is what a person types; Hydra wants
``generate.prompts=['A leaf, and lemons'] +target=cpu generate.steps=30``, and takes a comma in an
unquoted value for a sweep.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any


def hydra_arguments(
    arguments: Sequence[str], selectors: Collection[str], section: str, section_class: Any
) -> list[str]:
    """Return the arguments with short ones replaced; all others stay as they are.

    Args:
        arguments: of the command line.
        selectors: keys that are not in params.yaml, such as ``target``; they get their ``+``.
        section: the section of params.yaml that has the stage's name, e.g. ``generate``.
        section_class: its dataclass; None where there is no such section. A key of it needs no
            prefix, its text no quotes, and ``prompt=…``, once or more, is the list ``prompts``.
    """
    types = _types(section_class)
    result: list[str] = []
    lists: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            result.append(argument)
        elif key in selectors:
            result.append(f"+{argument}")
        elif types.get(f"{key}s") == list[str]:
            lists.setdefault(f"{key}s", []).append(quoted(value))
        elif key in types:
            text = quoted(value) if types[key] is str else value
            result.append(f"{section}.{key}={text}")
        else:
            result.append(argument)
    return result + [f"{section}.{key}=[{','.join(values)}]" for key, values in lists.items()]


def _types(section_class: Any) -> dict[str, Any]:
    if section_class is None:
        return {}
    hints = typing.get_type_hints(section_class)
    return {field.name: hints[field.name] for field in fields(section_class)}


def quoted(text: str) -> str:
    """Return text as a quoted value of Hydra's grammar, which gives back exactly this text.

    https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values
    """
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{text}'"
