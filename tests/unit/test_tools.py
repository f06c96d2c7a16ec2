"""What people who audit run: the verdict on known vulnerabilities, and the file of hashes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tools.audit import skipped, verdict_of
from tools.hash_requirements import CONSTRAINTS, HASHES, LEFT_OUT, requirements

from tests.conftest import ROOT

# As pip-audit 2 writes them.
SOUND = {"name": "dvc", "version": "3.67.1", "vulns": []}
VULNERABLE = {
    "name": "jinja2",
    "version": "3.1.5",
    "vulns": [{"id": "GHSA-0", "fix_versions": ["3.1.6"], "aliases": [], "description": "…"}],
}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found and could not be audited"}


@pytest.mark.parametrize(
    ("packages", "status", "expected"),
    [
        ([SOUND], 0, ["1 of 1 packages of constraints.txt were audited"]),
        (
            [SOUND, VULNERABLE],
            1,
            ["jinja2 3.1.5: GHSA-0, mended in 3.1.6", "2 of 2 packages"],
        ),
        ([SOUND, UNKNOWN], 0, ["not audited: torch: Dependency", "1 of 2 packages"]),
        ([UNKNOWN, UNKNOWN], 0, ["SKIPPED: nothing was audited", "Dependency not found"]),
        ([], 0, ["SKIPPED: nothing was audited"]),
    ],
)
def test_an_audit_says_what_is_known_and_what_was_not_asked(
    packages: list[dict[str, Any]], status: int, expected: list[str]
) -> None:
    verdict = verdict_of({"dependencies": packages, "fixes": []})
    assert verdict.status == status
    for text in expected:
        assert any(line.startswith(text) for line in verdict.lines), verdict.lines


def test_what_cannot_be_asked_is_skipped_aloud() -> None:
    verdict = skipped("no answer", "Traceback\nConnectionError: no route\n\n")
    assert verdict.lines == ["SKIPPED: nothing was audited: no answer", "ConnectionError: no route"]


def test_every_third_party_file_has_its_hash() -> None:
    """After a change of constraints.txt: `python tools/hash_requirements.py`."""
    listed = [line for line in HASHES.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in listed)
    assert [line.split()[0] for line in listed] == requirements(CONSTRAINTS.read_text())
    pinned = CONSTRAINTS.read_text()
    assert all(f"\n{name}==" in pinned for name in LEFT_OUT)
    assert HASHES.parent == ROOT
