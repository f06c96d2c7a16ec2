"""Ask pip-audit's service about known vulnerabilities of constraints.txt: ``make audit``.

pip-audit gets an environment of its own, so that its dependencies are not among those tested. Where
it cannot be installed, or its service knows nothing, this says SKIPPED and ends with status 0; with
1 where a vulnerability is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
_SECONDS = 300


@dataclass(frozen=True)
class Verdict:
    """What an audit came to: the lines to print, and the exit status."""

    lines: Sequence[str]
    status: int


def main() -> None:
    verdict = audit()
    print(*verdict.lines, sep="\n")
    sys.exit(verdict.status)


def audit() -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        install = [python, "-m", "pip", "install", "--quiet", "pip-audit"]
        command = [python, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
        command += ["--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
        try:
            installed = _run(install)
            if installed.returncode:
                return skipped("pip-audit cannot be installed", installed.stderr)
            asked = _run(command)
        except subprocess.TimeoutExpired as error:
            return skipped(f"no answer in {_SECONDS} s", str(error))
    # Its status is 1 for a vulnerability, and for a service that does not answer.
    try:
        return verdict_of(json.loads(asked.stdout))
    except ValueError:
        return skipped("pip-audit's service does not answer", asked.stderr)


def verdict_of(found: Mapping[str, Any]) -> Verdict:
    """Return what pip-audit's JSON says.

    A package is listed with its vulnerabilities, or with a reason why nobody could say.
    """
    packages = found["dependencies"]
    unknown = [package for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        reason = unknown[0]["skip_reason"] if unknown else "nothing was asked"
        return skipped("pip-audit's service knows none of the packages", reason)
    lines = [
        f"{package['name']} {package['version']}: {known['id']}, mended in "
        f"{', '.join(known['fix_versions']) or 'no release yet'}"
        for package in packages
        for known in package.get("vulns", [])
    ]
    status = int(bool(lines))
    lines += [f"not audited: {package['name']}: {package['skip_reason']}" for package in unknown]
    audited = len(packages) - len(unknown)
    lines.append(f"{audited} of {len(packages)} packages of {CONSTRAINTS.name} were audited")
    return Verdict(lines, status)


def skipped(reason: str, details: str) -> Verdict:
    last = [line for line in details.splitlines() if line.strip()][-1:]
    return Verdict([f"SKIPPED: nothing was audited: {reason}", *last], 0)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)


if __name__ == "__main__":
    main()
