"""Compose ``conf/``, run ``dvc repro`` and say what came of it: what ``make repro`` does.

``python -m diffusion_engines.repro [hydra overrides]``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_engines import layout
from diffusion_engines.compose import compose_params
from diffusion_engines.errors import DiffusionEnginesError, HardwareError

_LOCK = Path(".dvc/tmp/repro.lock")


def main() -> None:
    """Run the whole pipeline; exit as dvc does."""
    try:
        with _only_one():
            changed = compose_params(sys.argv[1:], Path.cwd())
            print(f"params.yaml: {'composed anew' if changed else 'up to date'}", flush=True)
            started = time.perf_counter()
            status = subprocess.run(["dvc", "repro"], check=False).returncode
    except DiffusionEnginesError as error:
        sys.exit(str(error))
    if status:
        sys.exit(
            f"\ndvc repro failed with {status}; the message above says what to do.\n"
            "What was finished stays cached: `make repro` goes on from there."
        )
    summary = layout.REPORT / "fleet.json"
    if summary.is_file():
        _print_summary(json.loads(summary.read_text()), time.perf_counter() - started)


@contextmanager
def _only_one() -> Iterator[None]:
    """Hold a lock on this folder, so that two runs do not compose into each other's params.yaml.

    Raises:
        HardwareError: another run holds it.
    """
    import fcntl

    _LOCK.parent.mkdir(parents=True, exist_ok=True)
    with _LOCK.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise HardwareError(
                "another `make repro` works in this folder",
                found=f"process {lock.read().strip() or 'unknown'}",
                fix="wait for it; or work in a second clone that shares the cache:\n"
                f"`dvc cache dir --local {Path('.dvc/cache').resolve()}`",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _print_summary(fleet: dict[str, Any], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 124)
    weights = " + ".join([fleet["model"], *fleet["loras"]])
    table = Table(title=f"{weights}{' (synthetic weights)' if fleet['synthetic'] else ''}")
    for column in ("engine", "backend", "precision", "MB", "build s", "parity", "speed"):
        table.add_column(
            column,
            justify="right" if column in ("MB", "build s") else "left",
            no_wrap=column == "engine",  # its name is what the next command takes
        )
    for row in fleet["engines"]:
        table.add_row(
            row["name"],
            row["builder"],
            row["precision"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['build_seconds']:.1f}",
            row["parity"],
            row["speed"],
        )
    console.print(table)
    print(f"dvc repro took {seconds:.0f} s. To look at:")
    for path, what in (
        (layout.REPORT / "index.html", "the report: open it in a browser"),
        (layout.ARTIFACTS / "images", "what the engines paint, and how fast"),
        (layout.ARTIFACTS / "bundles", "the engines, each with its manifest"),
        (layout.ARTIFACTS / "onnx", "the ONNX graphs they were built from"),
    ):
        if path.exists():  # a fleet may measure nothing here
            print(f"  {path!s:<30} {what}")


if __name__ == "__main__":
    main()
