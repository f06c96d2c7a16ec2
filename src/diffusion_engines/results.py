"""What a stage measured, as JSON: a frozen dataclass, its writer, its reader, a format number.

The module that defines a result writes and reads it through these, so that whoever reads a file
has the type of whoever wrote it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import read_json, write_json

T = TypeVar("T")


def write_result(path: Path, result: Any, *, version: int) -> None:
    """Write a dataclass and the number of its format."""
    write_json(path, {**asdict(result), "format": version})


def read_result(path: Path, kind: type[T], *, version: int, stage: str = "", fix: str = "") -> T:
    """Read what :func:`write_result` wrote.

    Args:
        path: of the file.
        kind: the dataclass that it holds.
        version: the number of the format that is read here.
        stage: what writes the file, for the message.
        fix: the message's remedy, of a file that no stage writes.

    Raises:
        IntegrityError: the file is missing, damaged, or of another format.
    """
    fix = fix or f"run the stage again: `dvc repro --force --single-item {stage}`"
    found = read_json(path, fix)
    number = found.get("format") if isinstance(found, dict) else None
    if number != version:
        raise IntegrityError(
            f"{path} has another format than this version of diffusion-engines reads",
            expected=f"format {version}",
            found="no format number" if number is None else f"format {number}",
            fix=fix,
        )
    try:
        # As JSON: what is strict in a result, such as a gate of the config, takes no mapping else.
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityError(
            f"{path} does not hold what its format says",
            expected=f"a {kind.__name__}",
            found=first_problem(error),
            fix=fix,
        ) from error


def first_problem(error: ValidationError) -> str:
    """Say where the first problem is, what it is, and how many there are."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}; {error.error_count()} problem(s) in all"
