"""The table of experiments: what a person compares, without all the columns that DVC knows."""

from __future__ import annotations

from typing import Any

from diffusion_engines.experiments import experiments_table

SECTIONS = {"export", "engines", "targets"}


def row(name: str | None, rev: str, **values: Any) -> dict[str, Any]:
    about = {"Experiment": name, "rev": rev, "Created": "04:35 AM", "State": "Success"}
    kind = "branch_commit" if name else "baseline"
    return about | {"typ": kind, "parent": None, "Executor": "Dvc-task"} | values


def point(precision: str, psnr: float) -> dict[str, Any]:
    return {
        "export.opset": 22.0,
        "engines.cpu-unet.precision": precision,
        "targets.rtx40_int8.build.tf32": "False",  # a fleet that the baseline does not have
        "psnr": psnr,
        "artifacts/metrics/quantize/unet-int8.json:rel_l2": 0.07,
        "artifacts/engines/cpu/unet": f"hash of {precision}",
        "not_measured": None,
    }


BASE = {"export.opset": 18.0, "engines.cpu-unet.precision": "fp32", "psnr": "!"}
ROWS = [
    row(None, "workspace", **BASE),
    row(None, "main", **BASE),
    row("sixth-poof", "6c9bd06", **point("fp32", 100.0)),
    row("pricy-lier", "8f8c0d4", **point("int8", 20.275936)),
]


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = experiments_table(rows, SECTIONS)
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(line) for line in zip(*columns, strict=True)]


def test_columns_are_the_metrics_and_the_parameters_that_experiments_differ_in() -> None:
    assert cells(ROWS) == [
        ["experiment", "created", "state", "engines.cpu-unet.precision", "psnr"],
        ["main", "04:35 AM", "Success", "fp32", "-"],
        ["sixth-poof", "04:35 AM", "Success", "fp32", "100"],
        ["pricy-lier", "04:35 AM", "Success", "int8", "20.276"],
    ]


def test_without_experiments_the_commit_stands_alone() -> None:
    assert cells(ROWS[:2]) == [["experiment", "created", "state"], ["main", "04:35 AM", "Success"]]
