"""Run checks one after the other, whatever becomes of each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from diffusion_engines.doctor.findings import Check, Finding, missing
from diffusion_engines.errors import DiffusionEnginesError
from diffusion_engines.files import read_json, write_json
from diffusion_engines.processes import describe_status, run_into, tail

# A TensorRT build of the toy network takes seconds, at the highest optimization level a minute.
_LIMIT = 900.0
_WORKER = "diffusion_engines.doctor.worker"


def run_checks(
    checks: Sequence[Check], folder: Path, limit: float = _LIMIT, worker: str = _WORKER
) -> Iterator[tuple[Check, Finding]]:
    """Run each check in a process of its own; yield it with what it found.

    A check whose needs have not passed is missing, and does not run.

    Args:
        checks: to run.
        folder: that the checks share.
        limit: seconds after which a check is ended, and has failed.
        worker: the module that runs one of the checks by its name, as
            :mod:`diffusion_engines.doctor.worker`.
    """
    found: dict[str, Finding] = {}
    for check in checks:
        lacking = [name for name in check.needs if found[name].status != "passed"]
        if lacking:
            finding = missing(f"needs: {', '.join(lacking)}")
        else:
            finding = _run_alone(worker, check.name, folder, limit)
        found[check.name] = finding
        yield check, finding


def _run_alone(worker: str, name: str, folder: Path, limit: float) -> Finding:
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", worker, name, str(folder)]
    started = time.perf_counter()
    with log.open("w") as file:
        try:
            ended = describe_status(run_into(file, command, limit=limit))
        except subprocess.TimeoutExpired:
            ended = f"had not ended after {limit:.0f} s"
    seconds = time.perf_counter() - started
    if result.is_file():  # also when the process crashed afterwards, while a library was unloaded
        return replace(Finding(**read_json(result)), seconds=seconds)
    output = tail(log.read_text(errors="replace"))
    return Finding("failed", f"its process {ended}; the end of its log:\n{output}", {}, seconds)


def run_one(check: Check, folder: Path) -> None:
    """Run a check in this process and write what it found where :func:`run_checks` reads it."""
    try:
        finding = check.run(folder)
    except DiffusionEnginesError as error:
        finding = Finding("failed", str(error))
    except Exception as error:  # whatever a library raises is what was looked for
        import traceback

        lines = traceback.format_exception(error)[-4:-1]
        finding = Finding("failed", f"{type(error).__name__}: {error}\n{''.join(lines)}".strip())
    write_json(folder / f"{check.name}.json", asdict(finding))


def report(findings: Sequence[tuple[Check, Finding]], about: Mapping[str, str]) -> tuple[str, str]:
    """Return the page, in Markdown, and the JSON.

    Args:
        findings: in the order of the checks.
        about: what was looked at, and when.
    """
    count = {
        status: sum(finding.status == status for _, finding in findings)
        for status in ("passed", "failed", "missing")
    }
    lines = ["# What works on this machine", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [f"- {', '.join(f'{number} {status}' for status, number in count.items())}", ""]
    lines += ["| check | result | s | found |", "|---|---|---|---|"]
    for check, finding in findings:
        first = finding.detail.splitlines()[0] if finding.detail else ""
        result = f"**{finding.status}**" if finding.status == "failed" else finding.status
        cell = first.replace("|", "\\|")
        lines.append(f"| {check.title} | {result} | {finding.seconds:.1f} | {cell} |")
    for check, finding in findings:
        more = finding.status == "failed" or finding.facts
        if more:
            lines += ["", f"## {check.title}", "", "```"]
            lines += finding.detail.splitlines() if finding.status == "failed" else []
            lines += [f"{key}: {_shown(value)}" for key, value in finding.facts.items()]
            lines += ["```"]
    content = {
        "about": dict(about),
        "checks": [{"name": check.name, **asdict(finding)} for check, finding in findings],
    }
    return "\n".join(lines) + "\n", json.dumps(content, indent=1, default=str) + "\n"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
