"""Numerical distances between tensors and between images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Difference:
    """Distance of one output from its reference.

    Attributes:
        rel_l2: L2 norm of the difference over that of the reference.
        max_abs: largest absolute difference, in the output's own unit.
        cosine: cosine of the angle between both as vectors.
        not_finite: how many values of the output are NaN or infinite.
    """

    rel_l2: float
    max_abs: float
    cosine: float
    not_finite: int


def difference(output: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Compare two tensors of one shape, in fp64.

    NaN and infinities of the output count, and make the distances infinite.

    Raises:
        ValueError: the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(output.shape)} and {tuple(reference.shape)}")
    x, y = output.double().flatten(), reference.double().flatten()
    not_finite = int((~torch.isfinite(x)).sum())
    if not_finite:
        return Difference(float("inf"), float("inf"), 0.0, not_finite)
    norm = max(float(y.norm()), 1e-30)
    cosine = float(x @ y) / max(float(x.norm()) * norm, 1e-30)
    return Difference(float((x - y).norm()) / norm, float((x - y).abs().max()), cosine, 0)


def worst_difference(
    outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor]
) -> Difference:
    """Compare the outputs of one call; return the worst of each distance over all of them.

    Raises:
        ValueError: their number, or a shape, differs.
    """
    found = [difference(*pair) for pair in zip(outputs, references, strict=True)]
    return Difference(
        rel_l2=max(value.rel_l2 for value in found),
        max_abs=max(value.max_abs for value in found),
        cosine=min(value.cosine for value in found),
        not_finite=sum(value.not_finite for value in found),
    )


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of images (batch, 3, h, w) in [0, 1].

    Equal images have an infinite one; it is given as 100 dB, which 8-bit images cannot reach.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if not torch.isfinite(image).all():
        return 0.0
    return min(float(peak_signal_noise_ratio(image, reference, data_range=1.0)), 100.0)


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity, at most 1, of images (batch, 3, h, w) in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if not torch.isfinite(image).all():
        return 0.0
    return float(structural_similarity_index_measure(image, reference, data_range=1.0))  # type: ignore[arg-type]
