"""The figure of a search: what each group costs at every call, and what groups cost together."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from diffusion_engines.lowering.search import Found, Measured

_DPI = 160
_BLUE, _GREY, _RED = "#0072B2", "#8a8f98", "#D55E00"


def draw_search(path: Path, found: Found, built: Measured, allowed: float) -> None:
    """Draw the cost of each group alone at every call, and the curve beside what is allowed.

    Args:
        path: of the PNG.
        found: by the search.
        built: what was chosen, as it is built.
        allowed: relative L2 error.
    """
    names = list(found.alone)
    with plt.rc_context({"font.size": 9, "savefig.facecolor": "white"}):
        figure, (alone, together) = plt.subplots(
            1, 2, figsize=(12, 1.6 + 0.24 * len(names)), layout="constrained"
        )
        errors = np.array([[call.rel_l2 for call in found.alone[name].calls] for name in names])
        shown = alone.imshow(errors, aspect="auto", norm=LogNorm(), cmap="viridis")
        figure.colorbar(shown, ax=alone, label="relative L2 error")
        alone.set_yticks(range(len(names)), names)
        alone.set_xlabel("recorded call")
        alone.set_title("each group alone in 8 bits", fontsize=10)

        measured = [
            (len(point.lowered), point.measured.rel_l2) for point in found.curve if point.measured
        ]
        together.plot(*zip(*measured, strict=True), color=_BLUE, marker="o", ms=4, label="measured")
        together.plot(
            [len(point.lowered) for point in found.curve],
            [point.predicted for point in found.curve],
            color=_GREY,
            ls="--",
            label="predicted",
        )
        together.axhline(allowed, color=_RED, lw=1, label="allowed")
        together.plot(
            [len(found.chosen.lowered)], [built.rel_l2], color=_RED, marker="*", ms=12, ls="",
            label=f"chosen, as built: {built.bytes / 1e6:.1f} MB",
        )  # fmt: skip
        together.set_yscale("log")
        together.set_xlabel("groups in 8 bits, the cheapest for their bytes first")
        together.set_ylabel("relative L2 error at the worst call")
        together.legend(frameon=False)
        figure.savefig(path, dpi=_DPI)
        plt.close(figure)
