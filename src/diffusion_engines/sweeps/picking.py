"""Write a point into ``conf/``, as a person would: the files say it, and compose to it.

Each override of the point is written where its value stands: in the option of its group, in the
fleet, in the model, or as the choice of a group in ``conf/config.yaml``. What then is composed has
to be the point's own parameters, key by key; else everything is put back.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffusion_engines.compose import compose_params, composed_params
from diffusion_engines.config import DERIVED
from diffusion_engines.errors import ConfigError, first_line
from diffusion_engines.params import Difference, differences
from diffusion_engines.runs import composition
from diffusion_engines.sweeps.fronts import Rule
from diffusion_engines.sweeps.measured import SweepRecord, read_sweeps, results_of
from diffusion_engines.sweeps.sweeping import points_of
from diffusion_engines.yaml_edits import with_value
from diffusion_engines.yaml_files import PARAMS

_CONFIG = Path("conf/config.yaml")
# Sections that a fleet's file holds, from the top; a model's are `model` and `image`.
_OF_FLEET = ("fleet", "targets", "measure")
_OF_MODEL = ("model", "image")
_DIGEST = "conf_digest"


@dataclass(frozen=True)
class Picked:
    """What was written.

    Attributes:
        name: of the point.
        why: it was picked, in words.
        changes: of the parameters.
        files: that were edited, relative to the root.
    """

    name: str
    why: str
    changes: tuple[Difference, ...]
    files: tuple[Path, ...]


def pick_rule(root: Path, rule: str, sweep: str | None) -> Picked:
    """Write the point that a rule picks of a sweep into ``conf/``, and compose.

    Args:
        root: of the repository.
        rule: of ``conf/pick/``.
        sweep: its name; None: the one that was run last.

    Raises:
        ConfigError: there is no such rule or sweep, no point is within the gates, or the point
            cannot be written.
    """
    folder, record = _sweep(root, sweep)
    points = points_of(results_of(folder, record), root)
    if rule not in points.rules:
        raise ConfigError(
            f"there is no rule {rule}",
            expected=", ".join(points.rules),
            found=rule,
            fix=f"name one of them, or write conf/pick/{rule}.yaml",
        )
    if rule not in points.picks:
        raise ConfigError(
            f"no point of the sweep {record.name} is within the gates",
            expected="one that is built, validated and timed",
            found=f"{len(points.measured)} measured points",
            fix=f"`{record.command}` says what each failed of",
        )
    name = points.picks[rule]
    overrides = next(overrides for point, overrides, _ in record.points if point == name)
    kind: Rule = points.rules[rule]
    why = f"{rule} of the sweep {record.name} ({kind.rule} {kind.of})"
    return _write_point(root, name, why, overrides)


def pick_revision(root: Path, revision: str) -> Picked:
    """Write the parameters of a revision or an experiment into ``conf/``, and compose.

    Args:
        root: of the repository.
        revision: of git, or the name of an experiment or of a sweep's point.

    Raises:
        ConfigError: there is no such revision, or its parameters cannot be written.
    """
    for _, record in reversed(read_sweeps(root)):
        for name, overrides, _ in record.points:
            if name == revision:
                return _write_point(root, name, f"a point of the sweep {record.name}", overrides)
    wanted = yaml.safe_load(_params_of(root, revision))
    current = yaml.safe_load(composed_params([], root))
    values = [(change.key, change.after) for change in _changes(current, wanted)]
    return _write(root, revision, "as it was named", values, wanted)


def _sweep(root: Path, name: str | None) -> tuple[Path, SweepRecord]:
    found = [one for one in read_sweeps(root) if name in (None, one[1].name)]
    if not found:
        known = [record.name for _, record in read_sweeps(root)]
        raise ConfigError(
            f"there is no sweep {name}" if name else "there is no sweep yet",
            expected=", ".join(known) or "one that was run in this folder",
            found=name or "none",
            fix="`diffusion-engines sweep precision` runs one",
        )
    return found[-1]


def _params_of(root: Path, revision: str) -> str:
    experiments = _git(root, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    named = next((ref for ref in experiments if ref.endswith(f"/{revision}")), revision)
    text = _git(root, "show", f"{named}:./{PARAMS}")
    if not text:
        raise ConfigError(
            f"there is no revision or experiment {revision}",
            expected="a commit, a branch, or a name that `make experiments` shows",
            found=revision,
            fix="`make experiments` lists them",
        )
    return text


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return "" if done.returncode else done.stdout


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return how parameters differ that a person writes."""
    left_out = {*DERIVED, _DIGEST}
    one, other = (
        {name: value for name, value in config.items() if name not in left_out}
        for config in (before, after)
    )
    return [
        Difference(change.key.removeprefix("."), change.before, change.after)
        for change in differences("", one, other)
    ]


def _write_point(root: Path, name: str, why: str, overrides: Sequence[str]) -> Picked:
    wanted = yaml.safe_load(composed_params(list(overrides), root))
    return _write(root, name, why, list(_assignments(overrides, wanted)), wanted)


def _write(
    root: Path,
    name: str,
    why: str,
    assignments: Sequence[tuple[str, Any]],
    wanted: Mapping[str, Any],
) -> Picked:
    before = yaml.safe_load(composed_params([], root))
    edits = _Edits(root)
    with composition(root):
        try:
            # Choices first: values are written into what is chosen.
            for key, value in sorted(assignments, key=lambda one: not _is_choice(one[0])):
                edits.set(key, value)
            edits.write()
            left = _changes(yaml.safe_load(composed_params([], root)), wanted)
            if left:
                raise _incomplete(name, left)
            compose_params([], root)
        except BaseException:
            edits.put_back()
            raise
    changes = tuple(_changes(before, wanted))
    return Picked(name, why, changes, tuple(path.relative_to(root) for path in edits.changed))


def _is_choice(key: str) -> bool:
    return "@" in key or "." not in key


def _incomplete(name: str, left: Sequence[Difference]) -> ConfigError:
    return ConfigError(
        f"conf/ would not compose to {name}, and stays as it was",
        expected="values that can be written where they stand",
        found="\n".join(str(change) for change in left[:5]),
        fix=f"write these by hand, or take the experiment as it is: `dvc exp apply {name}`",
    )


def _assignments(overrides: Sequence[str], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return keys with their values: a group's choice, or the value that the key is composed to."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for one in OverridesParser.create().parse_overrides(list(overrides)):
        key = one.key_or_group + (f"@{one.package}" if one.package else "")
        if one.type is not None and one.type.name != "CHANGE":
            raise ConfigError(
                f"{one.input_line} adds or removes something, which is not written into conf/",
                expected="changes of what is there",
                found=str(one.input_line),
                fix="write it into conf/ by hand",
            )
        value: Any = wanted
        for part in key.split("."):
            if isinstance(value, list) and part.isdigit():
                value = value[int(part)]
            else:
                value = value.get(part, _NOTHING) if isinstance(value, dict) else _NOTHING
        is_choice = "@" in key or value is _NOTHING or isinstance(value, dict)
        yield key, str(one.value()) if is_choice else value


_NOTHING = object()


class _Edits:
    """Changes of files below conf/, in memory until they are written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: dict[Path, str] = {}
        self.now: dict[Path, str] = {}

    @property
    def changed(self) -> list[Path]:
        """The files that differ."""
        return [path for path, text in self.now.items() if text != self.before[path]]

    def set(self, key: str, value: Any) -> None:
        """Write a value, or a choice of a group, where it stands."""
        section, *rest = key.split(".")
        conf = self.root / "conf"
        if "@" in key or (not rest and (conf / section).is_dir()):
            self._choose(key, value)
        elif section in _OF_FLEET:
            self._set_in_fleet(key.split("."), value)
        elif section in _OF_MODEL:
            self._set(conf / "model" / f"{self._choice('model')}.yaml", key.split("."), value)
        else:
            self._set(conf / section / f"{self._choice(section)}.yaml", rest, value)

    def write(self) -> None:
        """Write what changed."""
        for path in self.changed:
            path.write_text(self.now[path])

    def put_back(self) -> None:
        """Undo :meth:`write`."""
        for path in self.changed:
            path.write_text(self.before[path])

    def _text(self, path: Path) -> str:
        if path not in self.now:
            self.before[path] = self.now[path] = path.read_text()
        return self.now[path]

    def _set(self, path: Path, keys: Sequence[str], value: Any) -> None:
        try:
            self.now[path] = with_value(self._text(path), keys, value)
        except (KeyError, FileNotFoundError) as error:
            raise ConfigError(
                f"{'.'.join(keys)} has no place in {path.relative_to(self.root)}",
                found=first_line(error),
                fix="write the value by hand where it belongs",
            ) from error

    def _set_in_fleet(self, keys: list[str], value: Any) -> None:
        path = self._fleet()
        entry = f"/precision@fleet.{keys[1]}" if len(keys) == 3 else ""
        if entry and keys[2] == "precision" and self._index(path, entry) is not None:
            self._choose(entry.removeprefix("/"), value)
        else:
            self._set(path, keys, value)

    def _fleet(self) -> Path:
        return self.root / "conf" / "fleet" / f"{self._choice('fleet')}.yaml"

    def _choose(self, group: str, option: str) -> None:
        for path, entry in ((self.root / _CONFIG, group), (self._fleet(), f"/{group}")):
            if (index := self._index(path, entry)) is not None:
                self._set(path, ["defaults", str(index), entry], option)
                return
        raise ConfigError(
            f"conf/ chooses no {group}",
            expected=f"an entry of {_CONFIG} or of {self._fleet().relative_to(self.root)}",
            found="none",
            fix="write it by hand",
        )

    def _index(self, path: Path, entry: str) -> int | None:
        defaults = (yaml.safe_load(self._text(path)) or {}).get("defaults", [])
        found = [i for i, one in enumerate(defaults) if isinstance(one, dict) and entry in one]
        return found[0] if found else None

    def _choice(self, group: str) -> str:
        path = self.root / _CONFIG
        index = self._index(path, group)
        if index is None:
            raise ConfigError(
                f"{_CONFIG} chooses no option of {group}",
                expected=f"`- {group}: …` in its defaults",
                found="none",
                fix="write the value by hand",
            )
        return str(yaml.safe_load(self._text(path))["defaults"][index][group])
