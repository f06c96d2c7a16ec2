"""The points of a sweep, of a file of ``conf/sweep/`` and overrides: composed and checked first."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from diffusion_engines.backends.base import STRICT
from diffusion_engines.checks import check_params
from diffusion_engines.compose import composed_params
from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError
from diffusion_engines.results import first_problem
from diffusion_engines.tables import check_same
from diffusion_engines.yaml_files import read_mapping

FOLDER = Path("conf/sweep")
# What stands for the swept target in the overrides of a file.
_TARGET = "{target}"
_DIGEST = "conf_digest:"
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One composition of a sweep.

    Attributes:
        name: of the experiment that it becomes.
        overrides: Hydra's, of this point alone.
        params: what params.yaml is under them.
    """

    name: str
    overrides: tuple[str, ...]
    params: str

    @property
    def key(self) -> str:
        """Of its parameters: points of one key are one point, whichever files say it."""
        lines = [line for line in self.params.splitlines() if not line.startswith(_DIGEST)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Sweep:
    """Points to compare, by what one target of each measures.

    Attributes:
        name: what its experiments and its folder are called after.
        target: whose latency, error and size are compared.
        points: each well composed.
    """

    name: str
    target: str
    points: tuple[Point, ...]


@checked(config=STRICT)
class SweepFile:
    """A ready sweep (conf/sweep/)."""

    # of Hydra, where a value may be a list such as `17,18,20`; {target} is the measured target
    overrides: Annotated[list[str], Field(min_length=1)]


def read_sweep(root: Path, name: str) -> list[str]:
    """Return the overrides of a ready sweep.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    return read_option(root, FOLDER, name, SweepFile).overrides


def read_option(root: Path, folder: Path, name: str, kind: type[T]) -> T:
    """Return a file of a folder of ``conf/`` that is no part of any composition, typed.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    from omegaconf import OmegaConf

    path = root / folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (root / folder).glob("*.yaml"))
        raise ConfigError(
            f"there is no {folder.name} {name}",
            expected=", ".join(known),
            found=name,
            fix=f"name one of them, or write {folder / name}.yaml",
        )
    # Unresolved: `${reference.steps}` is for Hydra, when it composes.
    content = OmegaConf.to_container(read_mapping(path), resolve=False)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content))  # strict, yet of mappings
    except ValidationError as error:
        raise ConfigError(
            f"{path} is no {folder.name}", found=first_problem(error), fix=f"correct {path}"
        ) from error


def compose_sweep(
    root: Path, name: str, given: Sequence[str], *, file: str, target: str | None = None
) -> Sweep:
    """Return every point of a sweep, composed and checked; nothing is written.

    Args:
        root: of the repository.
        name: of the sweep.
        given: overrides besides those of the file, whose keys they replace; a list of values
            sweeps over these, too.
        file: the ready sweep in ``conf/sweep/``.
        target: whose measurements are compared; None: the one that is measured.

    Raises:
        ConfigError: points that cannot be built are all named, or the target is not measured.
    """
    ready = read_sweep(root, file)
    if any(_TARGET in override for override in ready) and target is None:
        target = _measured(composed_params(_fixed(given), root), None)
    wanted = _merged([override.replace(_TARGET, target or "") for override in ready], given)
    points, problems = [], []
    for overrides, label in _product(wanted):
        point = f"{name}-{label}" if label else name
        try:
            text = composed_params(list(overrides), root)
            config = yaml.safe_load(text)
            check_same(config, root)
            check_params(params_from_config(config), root)
            target = _measured(text, target)
        except ConfigError as error:
            problem = f"{error.problem}{_found(error)}".replace("\n", "\n  ")
            problems.append(f"{' '.join(overrides)}: {problem}")
        else:
            points.append(Point(point, overrides, text))
    if problems:
        raise ConfigError(
            f"{len(problems)} of {len(problems) + len(points)} points of the sweep are refused, "
            "and nothing was run:\n  - " + "\n  - ".join(problems),
            fix="leave them out, as in `export.opset=18,20`, or correct what they name",
        )
    assert target is not None  # of the points, each has one
    return Sweep(name, target, tuple(points))


def _found(error: ConfigError) -> str:
    return f"; found {' '.join(error.found.split())}" if error.found else ""


def _measured(params: str, target: str | None) -> str:
    measured = list(yaml.safe_load(params)["measured"])
    if target in measured or (target is None and len(measured) == 1):
        return target or str(measured[0])
    raise ConfigError(
        "a sweep compares what one target measures"
        + (f", and {target} is not measured" if target else ""),
        expected=f"--target, one of {', '.join(measured)}" if measured else "a measured target",
        found=target or f"{len(measured)} measured targets",
        fix="name one: `--target NAME`" if measured else "`measure=[NAME]` measures a target",
    )


def _parsed(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the key of each override, and the overrides of one value each that it stands for."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(
            "an override is not in Hydra's grammar",
            found=str(error).splitlines()[0],
            fix="as in `export.opset=17,18,20`; quote what has brackets or spaces",
        ) from error
    return [
        (
            one.key_or_group + (f"@{one.package}" if one.package else ""),
            [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
            if one.is_sweep_override()
            else [str(one.input_line)],
        )
        for one in parsed
    ]


def _fixed(given: Sequence[str]) -> list[str]:
    """Return the overrides of one value."""
    return [values[0] for _, values in _parsed(given) if len(values) == 1]


def _merged(ready: Sequence[str], given: Sequence[str]) -> list[list[str]]:
    """Return what is swept over, that of the command line in place of the file's."""
    merged = dict(_parsed(ready))
    merged |= _parsed(given)
    return list(merged.values())


def _product(wanted: Sequence[Sequence[str]]) -> list[tuple[tuple[str, ...], str]]:
    """Return the overrides of each point, and a label of the values that are swept over."""
    swept = [index for index, values in enumerate(wanted) if len(values) > 1]
    found = []
    for overrides in itertools.product(*wanted):
        values = [overrides[index].partition("=")[2] for index in swept]
        found.append((overrides, "-".join(filter(None, map(_slug, values)))))
    labels = [label for _, label in found]
    return [
        (overrides, label if labels.count(label) == 1 else f"{label}-{number}".strip("-"))
        for number, (overrides, label) in enumerate(found, 1)
    ]


def _slug(value: str) -> str:
    """Return a value as a part of the name of an experiment, which is one of git's refs."""
    return re.sub(r"[^A-Za-z0-9_+]+", "-", value).strip("-")
