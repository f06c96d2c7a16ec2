from __future__ import annotations

import math

import pytest

from diffusion_engines.report import text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.number(4.836), "4.84"),
        (text.number(12460.4), "12,460"),
        (text.number(math.nan), "NaN"),
        (text.scientific(0.0), "0"),
        (text.scientific(9.79e-7), "9.8e-07"),
        (text.scientific(math.inf), "∞"),
        (text.fixed(0.0004), "< 0.01"),
        (text.ratio(3.0, 0.0), ""),
        (text.ratio(3.0, math.nan), ""),
        (text.size(1_720_000_000), "1.72 GB"),
        (text.plural(1, "engine"), "1 engine"),
        (text.plural(2, "engine"), "2 engines"),
        (text.counts({"fp32": 10, "fp16": 1102}), "1,102 fp16, 10 fp32"),
        (text.key_values({"capabilities": ["12.0", "8.9"]}), "capabilities 8.9, 12.0"),
        (text.key_values({"max_aux": None, "b": {"level": "all"}}), "max aux default · level all"),
        (text.shape([2, 4, 16]), "2 × 4 × 16"),
    ],
)
def test_text(written, expected) -> None:
    assert written == expected
