"""The comparison of two states for people: a table in the terminal, and a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich import box
from rich.table import Table

from diffusion_engines.comparison.changes import Change, changes, differences, regressions
from diffusion_engines.comparison.states import State, state_of
from diffusion_engines.errors import ConfigError
from diffusion_engines.files import new_folder
from diffusion_engines.report.page import page_environment
from diffusion_engines.wording import console

_STYLES = {"better": "green", "worse": "red", "changed": "bold"}


def compare(root: Path, before: str, after: str, folder: Path) -> list[Change]:
    """Print two states side by side, and write a page of them; return what got worse.

    Args:
        root: of the repository.
        before: ``REVISION`` or ``REVISION:TARGET``, as of ``states.state_of``.
        after: likewise.
        folder: gets ``index.html``.

    Raises:
        ConfigError: a revision or target does not exist, or they have no target in common.
    """
    (old, old_target), (new, new_target) = _parts(before), _parts(after)
    with state_of(root, old) as one, state_of(root, new) as other:
        pairs = _pairs(one, other, old_target, new_target)
        facts, found = differences(one, other, pairs), changes(one, other, pairs)
        out = console()
        for line in (*one.unread, *other.unread):
            out.print(f"not compared: {line}")
        for line in facts or ["the same settings, libraries, weights and machines"]:
            out.print(f"  {line}", highlight=False)
        out.print(table_of(found, one.name, other.name))
        with new_folder(folder) as made:
            (made / "index.html").write_text(_page(one, other, pairs, facts, found), "utf-8")
    print(f"The page, with pictures: {folder / 'index.html'}")
    return regressions(found)


def _parts(given: str) -> tuple[str, str | None]:
    revision, _, target = given.partition(":")
    return revision, target or None


def _pairs(one: State, other: State, old: str | None, new: str | None) -> list[tuple[str, str]]:
    if old is None and new is None:
        pairs = [(target, target) for target in other.targets if target in one.targets]
    else:
        pairs = [(old or str(new), new or str(old))]
    for state, targets in zip((one, other), zip(*pairs, strict=True), strict=True) if pairs else ():
        if unknown := [target for target in targets if target not in state.targets]:
            raise ConfigError(
                f"{state.name} has no engines of {unknown[0]}",
                expected=", ".join(state.targets),
                found=unknown[0],
                fix="name targets as in REVISION:TARGET",
            )
    if not pairs:
        raise ConfigError(
            "the two have no target in common",
            expected=f"{one.name} has {', '.join(one.targets)}",
            found=f"{other.name} has {', '.join(other.targets)}",
            fix="name one of each: REVISION:TARGET REVISION:TARGET",
        )
    return pairs


def table_of(found: Sequence[Change], before: str, after: str) -> Table:
    """Return a row per number, marked where it is more than noise."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("target", "of", "what", before, after, "ratio", ""):
        table.add_column(name, justify="right" if name in (before, after, "ratio") else "left")
    for change in found:
        style = _STYLES.get(change.verdict)
        cells = [change.target, change.component, change.what, *_numbers(change), change.verdict]
        table.add_row(*cells, style=style)
    return table


def _numbers(change: Change) -> tuple[str, str, str]:
    ratio = change.ratio
    return (
        _text(change.before, change.unit),
        _text(change.after, change.unit),
        "" if ratio is None else f"{ratio:.3f}",
    )


def _text(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.4g} {unit}".rstrip()


def _page(
    one: State,
    other: State,
    pairs: Sequence[tuple[str, str]],
    facts: Sequence[str],
    found: Sequence[Change],
) -> str:
    rows = [
        {
            "target": change.target,
            "component": change.component,
            "what": change.what,
            "verdict": change.verdict,
            **dict(zip(("before", "after", "ratio"), _numbers(change), strict=True)),
        }
        for change in found
    ]
    pictures = {
        after: [
            (old, new)
            for old, new in zip(
                one.pictures.get(before, ()), other.pictures.get(after, ()), strict=False
            )
            if _sizes_agree(old, new)
        ]
        for before, after in pairs
    }
    return (
        page_environment("comparison")
        .get_template("page.html.j2")
        .render(
            one=one,
            other=other,
            unread=(*one.unread, *other.unread),
            facts=facts,
            rows=rows,
            pictures={target: both for target, both in pictures.items() if both},
        )
    )


def _sizes_agree(one: Path, other: Path) -> bool:
    with Image.open(one) as a, Image.open(other) as b:
        return a.size == b.size
