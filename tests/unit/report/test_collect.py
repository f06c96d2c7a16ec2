from __future__ import annotations

import math

import pytest

from diffusion_engines.report.collect import ComponentParity, LatentsParity

GATE = {"rel_l2": 1e-4, "max_abs": 1e-3, "cosine": 0.999}
GOOD = {"rel_l2": 1e-4, "max_abs": 1e-3, "cosine": 0.999, "not_finite": 0}


def test_at_the_tolerance_is_within_it() -> None:
    assert ComponentParity("unet", "fp16", GOOD, GATE, ()).passed


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("rel_l2", 1.1e-4),
        ("rel_l2", math.nan),
        ("max_abs", math.inf),
        ("cosine", 0.998),
        ("cosine", math.nan),
        ("not_finite", 1),
    ],
)
def test_one_metric_out_of_tolerance_fails(metric: str, value: float) -> None:
    part = ComponentParity("unet", "fp16", {**GOOD, metric: value}, GATE, ())
    assert not part.within(metric)
    assert not part.passed


@pytest.mark.parametrize(
    ("metric", "value", "passed"),
    [
        ("rel_l2", 1e-4, True),
        ("rel_l2", 1.1e-4, False),
        ("rel_l2", math.nan, False),
        ("cosine", 0.998, False),
        ("not_finite", 1, False),
    ],
)
def test_latents_out_of_tolerance_fail(metric: str, value: float, passed: bool) -> None:
    assert LatentsParity({**GOOD, metric: value}, GATE, (), ()).passed is passed
