"""Files and folders that are either whole or absent.

Every stage writes into a folder beside the final place and renames it, so that a killed run leaves
nothing that looks finished. What a folder should contain is in its manifest (``manifests.py``).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_engines.errors import IntegrityError

MANIFEST = "manifest.json"


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_from_json(value: Any) -> str:
    """Return JSON with sorted keys, so that equal content has equal bytes and an equal hash."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write :func:`text_from_json`."""
    with new_file(path) as partial:
        partial.write_text(text_from_json(value))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path whose file takes the place of ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path, fix: str = "") -> Any:
    """Read JSON.

    Raises:
        IntegrityError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path} does not exist", fix=fix or "run `dvc repro`, or `dvc pull` from a remote"
        ) from error
    # ValueError: no JSON, no text, or a number of too many digits; RecursionError: nested too deep.
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is not valid JSON",
            found=str(error),
            fix=fix or f"delete {path} and run `dvc repro` again",
        ) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block ends without an error.

    The folder lives in ``.tmp`` two levels up rather than next to ``path``: DVC hashes parent
    folders such as ``artifacts/bundles/cpu``, and must not see half of an output in them. What a
    killed run left there is removed by the next run that writes to the same ``path``.
    """
    scratch = _scratch_root(path) / "--".join(path.parts[-3:])
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if "artifacts" not in path.parts:  # a person's own folder; leave nothing else there
            with contextlib.suppress(OSError):
                scratch.parent.rmdir()


def _scratch_root(path: Path) -> Path:
    for parent in path.parents:
        if parent.name == "artifacts":
            return parent / ".tmp"
    return path.parent / ".tmp"


def copy_files(source: Path, destination: Path, *, skip: tuple[str, ...] = (MANIFEST,)) -> None:
    """Copy the files of a folder; the kernel shares the blocks where the file system can."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in skip:
            target = destination / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as src, target.open("wb") as dst:
        remaining = source.stat().st_size
        while remaining > 0:
            try:
                copied = os.copy_file_range(src.fileno(), dst.fileno(), remaining)
            except (AttributeError, OSError):
                break
            if copied == 0:
                break
            remaining -= copied
        if remaining:  # another file system, or not Linux
            src.seek(0)
            dst.seek(0)
            dst.truncate()
            shutil.copyfileobj(src, dst, 16 << 20)
