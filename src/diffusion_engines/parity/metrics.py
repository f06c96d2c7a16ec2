"""Numerical distances between tensors and between images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_engines.errors import IntegrityError
from diffusion_engines.parity.distances import Difference, worst_of


def difference(output: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Compare two tensors of one shape, in fp64.

    NaN and infinities of the output count, and make the distances infinite.

    Raises:
        ValueError: the shapes differ.
        IntegrityError: the reference has NaN or infinities; nothing can be said of the output.
    """
    if output.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(output.shape)} and {tuple(reference.shape)}")
    _check_finite(reference)
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
        IntegrityError: a reference has NaN or infinities.
    """
    return worst_of([difference(*pair) for pair in zip(outputs, references, strict=True)])


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of images (batch, 3, h, w) in [0, 1].

    Equal images have an infinite one; it is given as 100 dB, which 8-bit images cannot reach.

    Raises:
        IntegrityError: the reference has NaN or infinities.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_finite(reference)
    if not torch.isfinite(image).all():
        return 0.0
    return min(float(peak_signal_noise_ratio(image, reference, data_range=1.0)), 100.0)


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity, at most 1, of images (batch, 3, h, w) in [0, 1].

    Raises:
        IntegrityError: the reference has NaN or infinities.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_finite(reference)
    if not torch.isfinite(image).all():
        return 0.0
    return float(structural_similarity_index_measure(image, reference, data_range=1.0))  # type: ignore[arg-type]


def _check_finite(reference: torch.Tensor) -> None:
    if broken := int((~torch.isfinite(reference)).sum()):
        raise IntegrityError(
            "the reference has NaN or infinite values",
            expected="numbers, which the fp32 pipeline gives with sound weights",
            found=f"{broken} of {reference.numel()} values of one output",
            fix="look at artifacts/reference/*.png; mend the weights or the config, and record it\n"
            "again: `dvc repro --force --single-item reference`",
        )
