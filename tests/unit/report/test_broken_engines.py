"""What the report does with broken engines, and what must not reach its own dependencies."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_engines.config import LatentsGate
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.results import LatentsParity
from diffusion_engines.report.figures import draw_latents
from diffusion_engines.report.page import write_report
from tests.reports import Made

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("rel_l2", [math.inf, math.nan, 0.0])
def test_engines_that_are_broken_or_exact_have_a_page(
    fleet: Callable[..., Made], rel_l2: float
) -> None:
    made = fleet({"cpu-unet": "fp32"}, rel_l2=rel_l2)
    write_report(made.workspace, made.folder, **made.arguments)
    assert (made.folder / "parity-cpu.png").stat().st_size > 0
    verdict = "within tolerance" if rel_l2 == 0 else "MISSED"
    assert verdict in (made.folder / "index.html").read_text(encoding="utf-8")


def test_exact_latents_at_a_tolerance_of_zero_distance_are_drawn(tmp_path: Path) -> None:
    exact = (Difference(0.0, 0.0, 1.0, 0),) * 3
    gate = LatentsGate(rel_l2=1e-3, cosine=1.0)
    draw_latents(tmp_path / "latents.png", LatentsParity(gate, (exact,), ()))
    assert (tmp_path / "latents.png").stat().st_size > 0


def test_headline_names_the_hardware(fleet: Callable[..., Made]) -> None:
    made = fleet()
    write_report(made.workspace, made.folder, **made.arguments)
    page = (made.folder / "index.html").read_text(encoding="utf-8")
    facts = re.search(r'<dl class="facts">.*?</dl>', page, re.DOTALL)
    assert facts
    assert "Testor 9000" in facts[0]


def test_stage_logs_no_step_into_the_logs_that_it_depends_on() -> None:
    tree = ast.parse((ROOT / "stages" / "report.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "step"]
