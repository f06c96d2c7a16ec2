"""Which points are on a front, and which one each rule picks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diffusion_engines.sweeps.fronts import Measured, Points, Rule, front, pick, read_rules
from diffusion_engines.sweeps.measured import Numbers, PointResult, State, read_point, write_point
from tests.composition import ROOT


def point(
    name: str, ms: float, error: float, mb: float, state: State = "done", noise: float = 0.01
) -> Measured:
    draw = random.Random(name)
    numbers = Numbers(
        latency_ms=ms,
        repeats_ms=tuple(ms * (1 + noise * draw.uniform(-1, 1)) for _ in range(10)),
        speedup=1.0,
        memory_mb=1.0,
        error=error,
        component="unet",
        latents_rel_l2=error,
        psnr=50.0,
        size_mb=mb,
        machine={"cpu": "Testor 9000", "cores": 4, "memory_gib": 16, "gpus": []},
    )
    return PointResult(name, (), name, state, 1.0, "", (), numbers), numbers


FP32 = point("fp32", 20.0, 1e-6, 28.0)
FP16 = point("fp16", 12.0, 1e-3, 14.0)
INT8 = point("int8", 11.0, 1e-1, 8.0)
SLOW = point("slow", 25.0, 1e-3, 20.0)
BROKEN = point("broken", 1.0, 1.0, 1.0, "outside")
ALL = (FP32, FP16, INT8, SLOW, BROKEN)


def test_the_front_is_what_nothing_beats() -> None:
    assert front((FP32, FP16, INT8, SLOW), "latency") == {"fp32", "fp16", "int8"}
    assert front((FP16, SLOW), "size") == {"fp16"}
    twin = point("twin", 12.0, 1e-3, 14.0)
    assert front((FP16, twin), "latency") == {"fp16", "twin"}


def test_points_out_of_a_gate_are_on_no_front_and_never_picked() -> None:
    points = Points(ALL, read_rules(ROOT))
    assert "broken" not in points.fronts["latency"] | points.fronts["size"]
    assert points.picks == {"fastest": "int8", "smallest": "int8", "knee": "fp16"}
    assert points.notes("fp16") == ["knee", "front of latency", "front of size"]
    assert Points((BROKEN,), read_rules(ROOT)).picks == {}


def test_an_error_that_is_not_finite_is_on_no_front() -> None:
    assert front((FP32, point("nan", 1.0, float("nan"), 1.0)), "latency") == {"fp32"}


@pytest.mark.parametrize(
    ("noise", "picked"),
    [(0.3, "exact"), (0.0001, "coarse")],
    ids=["within the noise", "more than noise"],
)
def test_of_equally_fast_points_the_most_exact_is_picked(noise: float, picked: str) -> None:
    points = (
        point("coarse", 10.0, 1e-1, 1.0, noise=noise),
        point("exact", 10.2, 1e-6, 1.0, noise=noise),
        point("slow", 30.0, 1e-9, 1.0, noise=noise),
    )
    assert pick(points, Rule("smallest", "latency")) == picked


def test_a_straight_front_has_no_knee_and_a_single_point_is_its_own() -> None:
    straight = (
        point("a", 1.0, 1e-1, 1.0),
        point("b", 2.0, 1e-2, 1.0),
        point("c", 3.0, 1e-3, 1.0),
    )
    assert pick(straight, Rule("knee", "latency")) == "a"
    assert pick((FP32,), Rule("knee", "size")) == "fp32"
    bent = (*straight[::2], point("b", 1.2, 2e-3, 1.0))
    assert pick(bent, Rule("knee", "latency")) == "b"


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    result = point("x", 1.0, float("inf"), 2.0)[0]
    write_point(result, tmp_path)
    assert read_point(tmp_path, "x") == result
    assert read_point(tmp_path, "y") is None
    (tmp_path / "points/x.json").write_text('{"format": 0}')  # of another version
    assert read_point(tmp_path, "x") is None
