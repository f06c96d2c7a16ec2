"""What pictures cost, where somebody has said what the hardware costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusion_engines.config import Price

_PICTURES = 1000
_SECONDS = 3600


def price_of(machine: Mapping[str, Any], prices: Mapping[str, Price]) -> tuple[str, Price] | None:
    """Return the price of what a measurement ran on, and the name that it stands under.

    Args:
        machine: as of :func:`diffusion_engines.machines.this_machine`. Its first GPU counts, or its
            CPU where it has none: a benchmark uses one.
        prices: by words of hardware's names: "A10" is in "NVIDIA A10" and not in "NVIDIA A100". Of
            several, the longest counts.
    """
    name = next(iter(machine.get("gpus") or []), machine.get("cpu") or "")
    found = [words for words in prices if re.search(rf"(?<!\w){re.escape(words)}(?!\w)", str(name))]
    return (best, prices[best]) if (best := max(found, key=len, default=None)) else None


def thousand_pictures(price: Price, images_per_second: float) -> float:
    """Return what a thousand pictures cost at this rate, in the price's currency."""
    return price.per_hour * _PICTURES / images_per_second / _SECONDS
