"""Artifacts of a fleet of two targets, one of them measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reports import Made, make_fleet


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Make artifacts, and return what ``write_report`` takes, with an empty folder for it.

    Nothing may be read from the current folder, which is another one.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return functools.partial(make_fleet, tmp_path)
