"""Print DVC's experiments: their metrics, and the parameters in which they differ.

And the points of sweeps that became none, with the reason.

`dvc exp show` has a column for every parameter that one row has and another lacks: of a sweep over
another fleet, over a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from diffusion_engines.sweeps.measured import PointResult, SweepRecord, read_sweeps, results_of
from diffusion_engines.sweeps.running import is_swept
from diffusion_engines.wording import console
from diffusion_engines.yaml_files import PARAMS, read_mapping

_DVC = ("Experiment", "rev", "typ", "Created", "parent", "State", "Executor")


def print_experiments(root: Path) -> None:
    """Print the experiments that come from the current commit."""
    from dvc.api import exp_show

    sections = set(read_mapping(root / PARAMS))
    table = experiments_table(exp_show(str(root)), sections)
    console(500).print(table)
    for folder, record in read_sweeps(root):
        page = folder.relative_to(root) / "index.html"
        console(500).print(
            f"sweep {record.name}: {page}", highlight=False, soft_wrap=True, markup=False
        )
        if (points := points_table(record, results_of(folder, record), swept=is_swept(root))).rows:
            console(500).print(points)


def experiments_table(rows: Sequence[Mapping[str, Any]], sections: set[str]) -> Table:
    """Return a table of what ``dvc.api.exp_show`` gives; ``sections`` are those of params.yaml.

    A parameter is a column if the experiments differ in it; a metric, if any row has it.
    """
    rows = [row for row in rows if row["rev"] != "workspace"]
    experiments = [row for row in rows if row["typ"] != "baseline"]
    names = dict.fromkeys(name for row in rows for name in row if name not in _DVC)
    parameters = [
        name
        for name in names
        if name.split(".")[0] in sections and len({str(row.get(name)) for row in experiments}) > 1
    ]
    # The rest are files with their hashes, and metrics. With a path before them are those that
    # several files have, as of the stage `quantize`.
    metrics = [
        name
        for name in names
        if name.split(".")[0] not in sections
        and ":" not in name
        and any(isinstance(row.get(name), float) for row in rows)
    ]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("experiment", "created", "state", *parameters, *metrics):
        table.add_column(name, justify="right" if name in metrics else "left", overflow="fold")
    for row in rows:
        values = [row.get(name) for name in ("Created", "State", *parameters, *metrics)]
        table.add_row(str(row["Experiment"] or row["rev"]), *map(_text, values))
    return table


def points_table(record: SweepRecord, results: Sequence[PointResult], *, swept: bool) -> Table:
    """Return the points of a sweep that are no experiments, and why.

    Args:
        record: the sweep.
        results: of the points that have ended.
        swept: whether a sweep runs now.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("point", "state", "why"):
        table.add_column(name, overflow="fold")
    ended = {result.name: result for result in results}
    for name, _, _ in record.points:
        if name not in ended:
            why = "its sweep runs" if swept else f"`{record.command}` goes on"
            table.add_row(name, "without a result", why)
        elif (result := ended[name]).state != "done":
            table.add_row(name, result.state, result.error)
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "-" if value in (None, "", "!") else str(value)  # "!": DVC found no file
