"""What times something runs alone, and what does not runs beside others."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from diffusion_engines.turns import runs_alone, turn
from tests.composition import composed


class Block(threading.Thread):
    """A block that waits for its turn, and then until it is told to end."""

    def __init__(self, folder: Path, *, alone: bool) -> None:
        super().__init__(daemon=True)
        self.folder, self.alone = folder, alone
        self.inside, self.ending = threading.Event(), threading.Event()

    def run(self) -> None:
        with turn(self.folder, alone=self.alone):
            self.inside.set()
            self.ending.wait(30)

    def end(self) -> None:
        self.ending.set()
        self.join(30)


def started(folder: Path, *, alone: bool) -> Block:
    block = Block(folder, alone=alone)
    block.start()
    return block


def test_one_that_is_alone_waits_for_others_and_keeps_later_ones_out(tmp_path: Path) -> None:
    one, two = started(tmp_path, alone=False), started(tmp_path, alone=False)
    assert one.inside.wait(30)
    assert two.inside.wait(30)
    alone = started(tmp_path, alone=True)
    assert not alone.inside.wait(0.2)
    late = started(tmp_path, alone=False)
    one.end()
    assert not late.inside.wait(0.2)  # else the one that waits might wait for ever
    two.end()
    assert alone.inside.wait(30)
    assert not late.inside.wait(0.2)
    alone.end()
    assert late.inside.wait(30)
    late.end()


def test_without_others_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    with turn(None, alone=True) as waited:
        assert waited == 0
    with turn(tmp_path / "new", alone=True) as waited:
        assert waited < 5


@pytest.mark.parametrize(
    ("stage", "target", "expected"),
    [
        ("benchmark", "cpu", True),
        ("generate", "cpu", True),
        ("export", "cpu", False),
        ("build", "cpu", False),
        ("build", "a10", True),  # TensorRT times kernels
    ],
)
def test_stages_that_time_something_are_alone(stage: str, target: str, expected: bool) -> None:
    config = (
        composed(f"+target@targets.{target}={target}", f"+precision@fleet.{target}=fp16")
        if target != "cpu"
        else composed()
    )
    config |= {"engine": f"{target}-unet"}
    assert runs_alone(stage, config) is expected
