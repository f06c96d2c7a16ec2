"""Change one value of a YAML file as a person would: all else stays, comments and layout too."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

_INDENT = 2
# Of a scalar that YAML and OmegaConf read as the text that it is.
_PLAIN = re.compile(r"[A-Za-z_][\w./+-]*")
_NO_TEXT = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"}


def with_value(text: str, path: Sequence[str], value: Any) -> str:
    """Return a YAML document in which ``path`` has a value.

    Where the key is there, its value alone is replaced; where it is not, it is added at the end of
    the mapping that it belongs to.

    Args:
        text: of the document, whose top is a mapping, or which is empty.
        path: keys, outermost first; an index into a list is a key of digits.
        value: plain data.

    Raises:
        KeyError: something on the way is neither a mapping nor a list.
    """
    node = yaml.compose(text, yaml.SafeLoader)
    if node is None:
        return (
            f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{_block(path, value, 0)}"
        )
    rest = list(path)
    while rest:
        child = _child(node, rest[0])
        if child is None:
            return _added(text, node, rest, value)
        node, rest = child, rest[1:]
    return _replaced(text, node, value)


def _child(node: yaml.Node, key: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((child for name, child in node.value if name.value == key), None)
    if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
        return node.value[int(key)]
    raise KeyError(key)


def _replaced(text: str, node: yaml.Node, value: Any) -> str:
    end = _end(node)
    written = _inline(value)
    if node.start_mark.index == end:  # nothing stands there, after a colon
        written = f" {written}"
    return text[: node.start_mark.index] + written + text[end:]


def _added(text: str, node: yaml.Node, rest: Sequence[str], value: Any) -> str:
    if not isinstance(node, yaml.MappingNode):
        raise KeyError(rest[0])
    if node.flow_style:
        at = text.rindex("}", node.start_mark.index, node.end_mark.index)
        pair = f"{rest[0]}: {_inline(_nested(rest[1:], value))}"
        before = text[:at].rstrip()
        return f"{before}{', ' if node.value else ''}{pair}{text[at:]}"
    end = _end(node)
    line_end = text.find("\n", end)
    if line_end < 0:
        text, line_end = f"{text}\n", len(text)
    block = _block(rest, value, node.start_mark.column)
    return text[: line_end + 1] + block + text[line_end + 1 :]


def _end(node: yaml.Node) -> int:
    """Return where a node's own text ends: that of a block ends with its last value."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _nested(path: Sequence[str], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _block(path: Sequence[str], value: Any, column: int) -> str:
    """Return lines of nested keys, the last one with the value."""
    lines = [f"{' ' * (column + _INDENT * depth)}{key}:" for depth, key in enumerate(path)]
    lines[-1] += f" {_inline(value)}"
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, dict):
        pairs = (f"{_inline(key)}: {_inline(one)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        # YAML 1.2 takes 1e-05 for a number, and YAML 1.1 wants a point.
        mantissa, exponent, power = repr(value).partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + exponent + power
    return json.dumps(value)
