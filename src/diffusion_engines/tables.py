"""The tables that dvc.yaml loops over, derived from what a person writes of a fleet.

A fleet says which targets there are and in which precision each is built; which components there
are follows from the model's family. Everything else is derived here, whenever ``conf/`` is
composed, also by ``dvc exp run -S``: DVC imports ``hydra_plugins/``, which calls this module. So it
imports neither torch nor diffusers nor a backend's library.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from diffusion_engines.backends import backend
from diffusion_engines.backends.targets import target_from_settings
from diffusion_engines.config import DERIVED
from diffusion_engines.errors import ConfigError
from diffusion_engines.families import FAMILIES, family_of
from diffusion_engines.families.base import Component, Family
from diffusion_engines.precisions import PRECISIONS, graph_name

Table = dict[str, dict[str, Any]]
NAMES = DERIVED
# Names of targets become parts of commands, of file names and of YAML, where a word such as `on` or
# `1e3` is no text. The record of what wrapping a target `cpu` depends on is `cpu-wrap.json`.
_NAME = re.compile(r"(?!.*-wrap$)[a-z][a-z0-9_-]*")
_WORDS_OF_YAML = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}
# What every model has: where a wrap needs no weights, it depends on this instead.
_INDEX = "artifacts/weights/model_index.json"
# Likewise where a target is timed beside no other one's bundles.
_CHECKED = "artifacts/checks/conf.json"


def derive_tables(config: Mapping[str, Any], root: Path) -> dict[str, Table]:
    """Return every derived table by name, of a composed config.

    Args:
        config: the sections ``model``, ``targets``, ``fleet``, ``measure`` and ``quantize``, as
            plain data. What is wrong in them is derived as far as it goes: the stage `check_conf`
            says what is wrong, with all else that is.
        root: of the repository, which ``model.folder`` is relative to.

    Raises:
        ConfigError: a target's name could not be a part of a command, its backend does not exist,
            or the model's folder cannot be read.
    """
    _check_names({*config["targets"], *config["fleet"]})
    family = family_of(root / config["model"]["folder"])
    engines = dict(_engines(config, family))
    graphs = _graphs(engines, config["quantize"], family)
    alternatives = dict(_alternatives(config))
    return {
        "graphs": graphs,
        # DVC has no condition: what it loops over are tables.
        "exports": {name: graph for name, graph in graphs.items() if graph["source"] is None},
        "quantized": {name: graph for name, graph in graphs.items() if graph["source"]},
        "programs": {
            name: {
                "target": engine["target"],
                "component": engine["component"],
                "weights": family.components[engine["component"]].folder,
                "precision": engine["precision"],
            }
            for name, engine in engines.items()
            if _takes_programs(engine)
        },
        "engines": engines,
        "measured": {
            target: _measured(engines, target, alternatives.get(target))
            for target in config["measure"]
            if target in config["targets"]
        },
        "alternatives": {
            target: {"targets": [name for name, to in alternatives.items() if to == target]}
            for target in dict.fromkeys(alternatives.values())
        },
        "timing": {
            name: {"components": list(components_of(engines, name))}
            for name, target in config["targets"].items()
            if name in config["fleet"] and _answer(target, "timing")
        },
    }


def _check_names(names: Collection[object]) -> None:
    wrong = [
        name
        for name in names
        if not (isinstance(name, str) and _NAME.fullmatch(name) and name not in _WORDS_OF_YAML)
    ]
    if wrong:
        raise ConfigError(
            f"the name of a target cannot be {' or '.join(sorted(map(repr, wrong)))}",
            expected="a lower-case letter, then such letters, digits, - and _; no word of YAML as\n"
            "true or on, and nothing that ends in -wrap",
            found=", ".join(sorted(map(repr, wrong))),
            fix="give it another name in conf/fleet/, as in `- /target@targets.cheap: rtx40`",
        )


def components_of(engines: Mapping[str, Mapping[str, Any]], target: str) -> dict[str, str]:
    """Return the components that a target has engines for, with their precisions."""
    return {e["component"]: e["precision"] for e in engines.values() if e["target"] == target}


def declared_choice(precision: str) -> dict[str, Any]:
    """Return a target's entry of the section ``fleet``, with a key for everything it may say.

    Hydra lets an override change a key that exists, and wants a ``+`` for any other.
    """
    families = FAMILIES.values()
    components = dict.fromkeys(name for family in families for name in family.components)
    roles = dict.fromkeys(
        component.role for family in families for component in family.components.values()
    )
    return {
        "precision": precision,
        "only": None,
        "components": {**components, **roles},
        "alternative_to": None,
    }


def _alternatives(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the measured alternatives, each with what it is one to."""
    compared = [name for name in config["measure"] if name in config["targets"]]
    for name in compared:
        if (to := config["fleet"].get(name, {}).get("alternative_to")) in compared:
            yield name, to


def _measured(
    engines: Mapping[str, Mapping[str, Any]], target: str, other: str | None
) -> dict[str, Any]:
    return {
        "components": components_of(engines, target),
        "alternative_to": other,
        "beside": {} if other is None else components_of(engines, other),
        "beside_folder": _CHECKED if other is None else f"artifacts/bundles/{other}",
    }


def _engines(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
    for target, choice in config["fleet"].items():
        if target not in config["targets"]:
            continue
        module = backend(config["targets"][target]["backend"])
        for component in _chosen(choice, family):
            precision = _precision(choice, component, family)
            name = graph_name(component, precision, module.graph_format)
            # An exported program is of one PyTorch, which is the target's: it is nobody else's.
            source, added = f"artifacts/onnx/{name}", _INDEX
            if module.graph_format == "exported_program":
                source = f"artifacts/programs/{target}/{component}"
                added = f"artifacts/weights/{family.components[component].folder}"
            elif _answer(config["targets"][target], "builds_without_weights"):
                source, added = f"artifacts/structures/{name}", f"artifacts/onnx/{name}"
            yield (
                f"{target}-{component}",
                {
                    "target": target,
                    "backend": module.name,
                    "component": component,
                    "precision": precision,
                    "graph": name,
                    "graph_folder": source,
                    "code": module.code,
                    "shared": module.shared,
                    "wrap_code": module.wrap_code,
                    "wrap_weights": added,
                },
            )


def _answer(
    settings: Mapping[str, Any], question: Literal["timing", "builds_without_weights"]
) -> bool:
    """Ask a target's backend about it; no is the answer where its settings are wrong."""
    try:
        target = target_from_settings(settings)
    except ValidationError:  # which reading the section `targets` describes
        return False
    answer: bool = getattr(backend(target.backend), question)(target)
    return answer


def _chosen(choice: Mapping[str, Any], family: Family) -> list[str]:
    only = choice["only"]
    return [
        name
        for name, component in family.components.items()
        if only is None or name in only or component.role in only
    ]


def _precision(choice: Mapping[str, Any], component: str, family: Family) -> str:
    exceptions, role = choice["components"], family.components[component].role
    return exceptions.get(component) or exceptions.get(role) or choice["precision"]


def _takes_programs(engine: Mapping[str, Any]) -> bool:
    return backend(engine["backend"]).graph_format == "exported_program"


def _graphs(engines: Table, quantize: Mapping[str, Any], family: Family) -> Table:
    """Return the ONNX graphs that engines are built from, and those that these are made from."""
    graphs: Table = {}
    for engine in engines.values():
        if _takes_programs(engine):
            continue
        component = family.components[engine["component"]]
        known, source = PRECISIONS.get(engine["precision"]), None
        if known is not None and not known.exported:
            lowered_from = quantize.get(known.name, {}).get("source", known.sources[0])
            source = graph_name(component.name, lowered_from)
            graphs[source] = _graph(component, lowered_from, None)
        graphs[engine["graph"]] = _graph(component, engine["precision"], source)
    return graphs


def _graph(component: Component, precision: str, source: str | None) -> dict[str, Any]:
    return {
        "component": component.name,
        "weights": component.folder,
        "precision": precision,
        "source": source,
    }


def check_same(config: Mapping[str, Any], root: Path) -> None:
    """Raise ConfigError where a table is not the one that the rest of the config gives."""
    derived = derive_tables(config, root)
    if wrong := [name for name in NAMES if config[name] != derived[name]]:
        raise ConfigError(
            f"params.yaml: {', '.join(wrong)} cannot be set: what a fleet builds follows from the "
            "sections fleet, targets, measure and model",
            expected="the derived tables",
            found="others",
            fix="override fleet.<target>.precision, .components.<component> or .only instead",
        )
