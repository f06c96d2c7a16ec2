"""Results are read as they were written, or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines.errors import IntegrityError
from diffusion_engines.results import read_result, write_result


@dataclass(frozen=True)
class Part:
    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    parts: tuple[Part, ...]
    score: float | None = None


RESULT = Result((Part("a", (1.0, math.inf)), Part("b", ())))


def read(path: Path) -> Result:
    return read_result(path, Result, version=2, stage="toy@x")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, RESULT, version=2)
    assert read(path) == RESULT
    write_result(path, Result((Part("c", (math.nan,)),)), version=2)
    assert math.isnan(read(path).parts[0].values[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 1}, r"another format[\s\S]*format 2[\s\S]*found:    format 1"),
        ({"format": None}, r"found:    no format number"),
        ({"score": "high"}, r"does not hold what its format says[\s\S]*found:    score: "),
        ({"parts": [{"name": "a"}]}, r"found:    parts\.0\.values: "),
    ],
)
def test_anything_else_is_refused_with_the_stage_to_run(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "result.json"
    write_result(path, RESULT, version=2)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(IntegrityError, match=text) as raised:
        read(path)
    assert "dvc repro --force --single-item toy@x" in str(raised.value)


def test_what_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"does not exist[\s\S]*--single-item toy@x"):
        read(tmp_path / "result.json")
    (tmp_path / "result.json").write_text("[1")
    with pytest.raises(IntegrityError, match="is not valid JSON"):
        read(tmp_path / "result.json")
