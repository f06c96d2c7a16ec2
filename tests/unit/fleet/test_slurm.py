"""A job is judged by the queue, its record and its beat: with a queue and a clock of the test's.

On real daemons: tests/fleet/test_slurm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusion_engines.files import read_json, write_json
from diffusion_engines.fleet import slurm
from diffusion_engines.fleet.launching import Look
from diffusion_engines.fleet.settings import Request, Slurm
from diffusion_engines.fleet.slurm import QueueRow, SlurmLauncher, cancel_left_over
from diffusion_engines.fleet.tasks import Desk, Record, write_record

PATIENCE = 45.0
RUNNING, PENDING = QueueRow("RUNNING", "node1", "None"), QueueRow("PENDING", "", "Resources")
DOWN = QueueRow("PENDING", "", "ReqNodeNotAvail, UnavailableNodes:node1")


@dataclass
class World:
    """What Slurm says at what time, and what was asked of it."""

    launcher: SlurmLauncher
    desk: Desk
    cancelled: list[str]
    now: list[float]
    rows: list[Mapping[str, QueueRow] | None]

    def after(self, seconds: float, row: QueueRow | None, *, answers: bool = True) -> Look:
        self.now[0] += seconds
        self.rows[0] = ({"7": row} if row else {}) if answers else None
        return self.launcher.look()["a10"]

    def beat(self) -> None:
        self.desk.beat.write_text(f"{self.now[0]}\n")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "_submit", lambda name, desk, settings: "7")
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)
    now = [100.0]
    rows: list[Mapping[str, QueueRow] | None] = [{}]
    settings = Slurm("slurm", PATIENCE, Request(), {})
    launcher = SlurmLauncher(settings, tmp_path, lambda: rows[0], lambda: now[0])
    desk = Desk(tmp_path / "a10")
    desk.folder.mkdir()
    launcher.submit("a10", desk)
    return World(launcher, desk, cancelled, now, rows)


def test_a_job_that_does_well(world: World) -> None:
    assert world.after(3, PENDING) == Look("queued", "", "Resources")
    assert world.after(600, PENDING) == Look("queued", "", "Resources")
    assert world.after(3, RUNNING) == Look("running", "node1")
    for _ in range(5):
        world.beat()
        assert world.after(PATIENCE - 1, RUNNING) == Look("running", "node1")
    write_record(world.desk, Record("node1", 3.0))
    assert world.after(3, RUNNING) == Look("ended", "node1")
    assert world.cancelled == []


def test_a_node_that_died_is_found_by_its_silence(world: World) -> None:
    world.after(3, RUNNING)
    world.beat()
    world.after(3, RUNNING)
    assert world.after(PATIENCE - 1, RUNNING).state == "running"
    found = world.after(2, RUNNING)
    assert found.state == "ended"
    assert "node1 is silent: the node died? (for 46 s)" in found.note
    assert world.cancelled == ["7"]


def test_a_job_that_begins_after_hours_is_not_silent_yet(world: World) -> None:
    world.after(7200, PENDING)
    assert world.after(3, RUNNING).state == "running"


@pytest.mark.parametrize("row", [None, QueueRow("NODE_FAIL", "node1", "None")])
def test_a_job_that_left_no_record_is_waited_for_ten_seconds(
    world: World, row: QueueRow | None
) -> None:
    world.after(3, RUNNING)
    assert world.after(3, row).state == "running"
    assert world.after(9, row).state == "running"
    found = world.after(3, row)
    assert (found.state, found.where) == ("ended", "node1")
    assert "job 7 is " in found.note


def test_a_record_may_come_after_the_end_of_its_job(world: World) -> None:
    world.after(3, RUNNING)
    world.after(3, None)
    write_record(world.desk, Record("node1", 3.0))
    assert world.after(3, None) == Look("ended", "node1")


def test_a_job_for_a_node_that_is_down_is_given_up(world: World) -> None:
    assert world.after(3, DOWN) == Look("queued", "", DOWN.reason)
    assert world.after(PATIENCE - 1, DOWN).state == "queued"
    found = world.after(2, DOWN)
    assert found == Look("ended", "", f"no node for it is up: {DOWN.reason}")
    assert world.cancelled == ["7"]


def test_a_node_that_comes_back_is_waited_for(world: World) -> None:
    world.after(3, DOWN)
    world.after(3, PENDING)
    assert world.after(PATIENCE, DOWN).state == "queued"


def test_while_slurm_does_not_answer_the_beat_is_trusted(world: World) -> None:
    world.after(3, RUNNING)
    for _ in range(3):
        world.beat()
        assert world.after(PATIENCE - 1, None, answers=False).state == "running"
    found = world.after(PATIENCE + 1, None, answers=False)
    assert "Slurm does not answer" in found.note


def test_what_was_left_is_cancelled(world: World) -> None:
    folder = world.launcher.folder
    assert read_json(folder / "jobs.json") == ["7"]
    world.launcher.stop()
    assert world.cancelled == ["7"]
    assert world.launcher.look()["a10"] == Look("ended", "", "cancelled")
    assert read_json(folder / "jobs.json") == []
    write_json(folder / "jobs.json", ["8", "9"])  # of a command that was killed
    cancel_left_over(folder)
    assert world.cancelled == ["7", "8", "9"]
    assert not (folder / "jobs.json").exists()
