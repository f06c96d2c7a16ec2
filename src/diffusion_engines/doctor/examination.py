"""The whole examination: every check, and the page."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from diffusion_engines import __version__
from diffusion_engines.doctor.checks import CHECKS
from diffusion_engines.doctor.running import report, run_checks
from diffusion_engines.doctor.targets import write_builds

PAGE, JSON = "doctor.md", "doctor.json"


def examine(root: Path, folder: Path) -> list[str]:
    """Run every check, print what each came to, and write ``doctor.md`` and ``doctor.json``.

    Args:
        root: of the repository, whose ``conf/build/`` has the builder settings.
        folder: gets the page, the JSON, and what the checks made.

    Returns:
        The names of the checks that failed.
    """
    shutil.rmtree(folder / "work", ignore_errors=True)  # what an earlier run built
    work = (folder / "work").absolute()
    work.mkdir(parents=True)
    write_builds(root / "conf", work)
    about = {
        "diffusion-engines": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "diffusion-engines doctor",
    }
    findings = []
    for check, finding in run_checks(CHECKS, work):
        findings.append((check, finding))
        print(f"{finding.status:8} {check.title:34} {finding.detail}", flush=True)
    page, content = report(findings, about)
    (folder / PAGE).write_text(page)
    (folder / JSON).write_text(content)
    print(f"\nTo read and to send back: {folder / PAGE}, {folder / JSON}")
    return [check.name for check, finding in findings if finding.status == "failed"]
