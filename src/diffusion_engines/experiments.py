"""Print DVC's experiments: their metrics, and the parameters in which they differ.

`dvc exp show` has a column for every parameter that one row has and another lacks: of a sweep over
another fleet, over a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from diffusion_engines.wording import console
from diffusion_engines.yaml_files import PARAMS, read_mapping

_DVC = ("Experiment", "rev", "typ", "Created", "parent", "State", "Executor")


def print_experiments(root: Path) -> None:
    """Print the experiments that come from the current commit."""
    from dvc.api import exp_show

    sections = set(read_mapping(root / PARAMS))
    table = experiments_table(exp_show(str(root)), sections)
    console(500).print(table)


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


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "-" if value in (None, "", "!") else str(value)  # "!": DVC found no file
