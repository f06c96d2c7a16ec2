"""A small network that says what a drawing shows; it marks the samples of the diffusion model."""

from __future__ import annotations

from itertools import pairwise

import torch
from scenes import ATTRIBUTES
from torch import nn


class _Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, out, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            nn.GroupNorm(8, out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1),
            nn.GroupNorm(8, out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return x + self.body(x)


class Marker(nn.Module):
    """Images (n, 3, 128, 128) in [-1, 1] to logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        self.body = nn.Sequential(
            *(_Block(a, b) for a, b in pairwise(widths)),
            nn.GroupNorm(8, widths[-1]),
            nn.SiLU(),
            nn.Conv2d(widths[-1], 48, 1),  # 8 × 8 places: where things are matters
            nn.Flatten(),
            nn.Linear(48 * 64, 256),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of each attribute, (n, classes)."""
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}
