"""Numbers as the report writes them: three significant digits, GB = 1e9 bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_engines.families.base import Dim


def number(value: float) -> str:
    """Write a number with about three significant digits, e.g. ``4.84``, ``46.0``, ``12,460``."""
    if not math.isfinite(value):
        return _not_finite(value)
    size = abs(value)
    decimals = 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:,.{decimals}f}"


def scientific(value: float) -> str:
    """Write a small number, e.g. ``9.8e-07``; exactly zero is ``0``."""
    if not math.isfinite(value):
        return _not_finite(value)
    return f"{value:.1e}" if value else "0"


def fixed(value: float, decimals: int = 2) -> str:
    """Write a number for a column whose decimal points line up; what rounds to zero is ``< …``."""
    if not math.isfinite(value):
        return _not_finite(value)
    smallest = 10.0**-decimals
    if 0 < value < smallest / 2:
        return f"< {smallest:.{decimals}f}"
    return f"{value:,.{decimals}f}"


def ratio(numerator: float, denominator: float) -> str:
    """Write a speedup, e.g. ``2.38×``; empty where there is nothing to divide by."""
    if not (math.isfinite(numerator) and math.isfinite(denominator)) or denominator <= 0:
        return ""
    return f"{numerator / denominator:.2f}×"


def size(count: float) -> str:
    """Write a number of bytes, e.g. ``10.4 kB``, ``5.98 MB``, ``1.72 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{number(count / factor)} {unit}"
    return f"{count:.0f} B"


def parameters(count: int) -> str:
    """Write a number of parameters, e.g. ``1.82 M``, ``1.07 G``."""
    return f"{number(count / 1e9)} G" if count >= 1e9 else f"{number(count / 1e6)} M"


def plural(count: int, singular: str, plural_: str = "") -> str:
    """Write a count with its noun, e.g. ``1 engine``, ``6 engines``."""
    return f"{count:,} {singular if count == 1 else plural_ or singular + 's'}"


def words(key: str) -> str:
    """Turn a key into words: ``compute_capabilities`` to ``compute capabilities``."""
    return key.replace("_", " ")


def key_values(mapping: Mapping[str, Any]) -> str:
    """Write a nested mapping on one line, e.g. ``device cpu · onnxruntime 1.32.0``."""
    parts = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            parts.append(key_values(value))
        elif isinstance(value, list):
            parts.append(f"{words(key)} {', '.join(map(str, sorted(value, key=_natural)))}")
        else:
            parts.append(f"{words(key)} {'default' if value is None else value}")
    return " · ".join(part for part in parts if part)


def counts(mapping: Mapping[str, int]) -> str:
    """Write counts, largest first, e.g. ``1,102 fp16, 10 fp32``."""
    ordered = sorted(mapping.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in ordered)


def shape(dims: Sequence[int | Dim]) -> str:
    """Write a shape, open dimensions with their range, e.g. ``2 × 4 × height 16 (8 to 96)``."""
    return " × ".join(_dim(dim) for dim in dims)


def machine(description: Mapping[str, Any]) -> str:
    """Name the hardware of a measurement, GPUs first, e.g. ``AMD EPYC, 2 cores, 24 GiB``."""
    gpus: list[str] = list(description.get("gpus") or [])
    named = [f"{gpus.count(gpu)} × {gpu}" if gpus.count(gpu) > 1 else gpu for gpu in gpus]
    cores = plural(int(description.get("cores") or 0), "core")
    parts = [
        *dict.fromkeys(named),
        f"{description.get('cpu') or 'unknown CPU'}, {cores}",
        f"{description.get('memory_gib', '?')} GiB",
    ]
    return ", ".join(parts)


def software(description: Mapping[str, Any]) -> str:
    """Name the libraries of a measurement, e.g. ``Python 3.11, torch 2.13.0, CUDA 13.0``."""
    parts = [f"Python {description['python']}"] if description.get("python") else []
    parts += [f"{name} {version}" for name, version in description.get("libraries", {}).items()]
    if description.get("cuda"):
        parts.append(f"CUDA {description['cuda']}")
    return ", ".join(parts)


def _dim(dim: int | Dim) -> str:
    if isinstance(dim, int):
        return str(dim)
    step = f", step {dim.step}" if dim.step != 1 else ""
    return f"{dim.name} {dim.size} ({dim.min} to {dim.max}{step})"


def _natural(value: Any) -> tuple[float, str]:
    """Order "12.0" after "8.9"."""
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return math.inf, str(value)


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else "-∞"
