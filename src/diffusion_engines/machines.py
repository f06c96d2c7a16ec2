"""The machine that a target is timed on: one record a target, tracked in git.

Timings are facts about one machine. Whichever machine runs `dvc repro` next keeps the record, and
with it the results that were taken there; it is written anew only where somebody asks, on a machine
that the target is for. What a build depends on is the backends' (``fingerprint``), and kept apart.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusion_engines import cpu
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import read_json, write_json

Machine = Mapping[str, Any]

# The environment variable that names the targets to time on this machine, with commas.
MEASURE = "DIFFUSION_ENGINES_MEASURE"


def this_machine() -> dict[str, Any]:
    """Describe this machine coarsely, so that a reboot or another kernel is the same machine."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total
    return {
        "cpu": cpu.this_cpu().name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "libraries": {
            name: metadata.version(name).split("+")[0]
            for name in ("torch", "diffusers", "transformers")
        },
    }


def keep_or_write_record(
    target: str, record: Path, check_hardware: Callable[[], None], *, asked: bool
) -> None:
    """Keep a target's record, or write that of this machine where asked, or where there is none.

    Args:
        target: its name.
        record: the file.
        check_hardware: raises HardwareError where this is no machine that the target is for.
        asked: whether somebody wants the target timed on this machine. The record then gets a new
            time, without which an equal machine would have an equal record, and nothing would run.

    Raises:
        HardwareError: this machine is needed for a record, and is not one that the target is for.
    """
    if is_kept(target, record, check_hardware, asked=asked):
        kept = read_json(record)
        print(f"  {target} was timed on {describe(kept['machine'])}, {kept['time']}")
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(record, {"machine": this_machine(), "time": now})


def is_kept(target: str, record: Path, check_hardware: Callable[[], None], *, asked: bool) -> bool:
    """Return whether a target's record stays as it is, else this machine's would take its place.

    The arguments are those of :func:`keep_or_write_record`.

    Raises:
        HardwareError: this machine is needed for a record, and is not one that the target is for.
    """
    if record.is_file() and not asked:
        return True
    try:
        check_hardware()
    except HardwareError as error:
        raise HardwareError(
            f"the target {target} cannot be timed on this machine\n  because:  {error.problem}",
            expected=error.expected,
            found=error.found,
            fix=f"on such a machine: {command(target)}; then get {record} and dvc.lock from git\n"
            f"here. Or take {target} out of `measure` (conf/fleet/): its engines are built all the "
            "same",
        ) from error
    return False


def check_record(target: str, record: Path) -> Machine:
    """Return this machine, if it is the one on record, so that no result is filed under another.

    Raises:
        IntegrityError: there is no record.
        HardwareError: this is another machine.
    """
    recorded, here = read_json(record)["machine"], this_machine()
    if recorded == here:
        return here
    keys = [key for key in here if recorded.get(key) != here[key]]
    raise HardwareError(
        f"{target} was timed on another machine, and something that its timings depend on has "
        "changed since",
        expected=", ".join(f"{key} {_text(recorded.get(key))}" for key in keys),
        found=", ".join(f"{key} {_text(here[key])}" for key in keys),
        fix=f"time it here, which replaces the record: {command(target)};\n"
        "or run `dvc repro` on the machine of the record, push, and pull here",
    )


def machine_of_result(target: str, record: Path, *, filed: bool) -> Machine:
    """Return the machine that a measurement is taken on, which is this one.

    Args:
        target: whose engines are measured.
        record: the file that says where its timings are taken.
        filed: whether the result is filed with that record, as under DVC; by hand it is anybody's.

    Raises:
        IntegrityError, HardwareError: as of :func:`check_record`.
    """
    return check_record(target, record) if filed else this_machine()


def command(target: str) -> str:
    """Return the command that times a target on this machine."""
    return f"`make measure TARGET={target}`"


def describe(machine: Machine) -> str:
    """Name the hardware in a line, GPUs first, e.g. ``AMD EPYC, 2 cores``."""
    return ", ".join([*machine["gpus"], machine["cpu"], f"{machine['cores']} cores"])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
