"""The groups of layers that get 8 bits, or keep the source's precision, together."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

# Fewer groups than this leave little to choose from; a level more makes several of each.
_ENOUGH = 12


@dataclass(frozen=True)
class Group:
    """Layers of one module, or those that a pattern of ``quantize.*.kept`` names.

    Attributes:
        name: for people, and for what is stored.
        pattern: the regular expression that names exactly these layers in ``quantize.*.kept``.
        nodes: of the graph.
    """

    name: str
    pattern: str
    nodes: frozenset[str]


def layer_groups(
    layers: Mapping[str, str], kept: Sequence[str], lowerable: Collection[str], depth: int | None
) -> list[Group]:
    """Return groups of which each layer that can be lowered is in one.

    Those that the config keeps today make a group for each of its patterns, as they are known to be
    delicate; the others are grouped by module.

    Args:
        layers: the names of a graph's layers, by node (``quantize.layer_names``).
        kept: the patterns of the config.
        lowerable: the nodes that the quantizer lowers where nothing is kept.
        depth: how many levels of modules tell groups apart; None: the first that makes twelve
            groups, else the deepest.
    """
    groups, left = [], dict(layers)
    for pattern in kept:
        nodes = {node for node, name in left.items() if re.search(pattern, name)}
        groups.append(Group(pattern, pattern, frozenset(nodes)))
        left = {node: name for node, name in left.items() if node not in nodes}
    deepest = max((name.count(".") for name in left.values()), default=2)
    depths = [depth] if depth else range(2, 1 + max(deepest, 2))
    for level in depths:
        modules = _by_module(left, kept, level)
        if len(groups) + len(modules) >= _ENOUGH:
            break
    return [group for group in (*groups, *modules) if group.nodes & set(lowerable)]


def _by_module(layers: Mapping[str, str], kept: Sequence[str], depth: int) -> list[Group]:
    modules: dict[str, set[str]] = {}
    for node, name in layers.items():
        modules.setdefault(".".join(name.split(".")[:-1][:depth]), set()).add(node)
    without = f"(?!.*(?:{'|'.join(kept)}))" if kept else ""
    return [
        Group(name, f"^{without}{re.escape(name)}\\.", frozenset(nodes))
        for name, nodes in modules.items()
    ]
