"""Named changes to PyTorch for the time of an export, each with its reason.

A patch is a context manager that restores what it changed. ``export.patches`` in ``conf/export/``
selects them by name, which the stage `check_conf` compares with these, without PyTorch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from diffusion_engines.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Patch:
    """A change that an export needs, and why."""

    reason: str
    apply: Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def _explicit_attention() -> Iterator[None]:
    from torch.nn import functional

    with mock.patch.object(functional, "scaled_dot_product_attention", _attention):
        yield


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute attention as matmul, softmax, matmul; arguments as of PyTorch's function."""
    import torch

    if dropout_p or enable_gqa:
        raise NotImplementedError("explicit_attention is for inference without grouped queries")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Scaling the query first keeps the products in fp16's range.
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        # Not triu: the TorchScript exporter has it from opset 14 on only.
        rows = torch.arange(query.shape[-2], device=query.device)
        columns = torch.arange(key.shape[-2], device=query.device)
        future = columns[None, :] > rows[:, None]
        scores = scores + torch.zeros_like(future, dtype=query.dtype).masked_fill(
            future, torch.finfo(query.dtype).min
        )
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            blocked = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = blocked.masked_fill(~attn_mask, lowest)
        scores = scores + attn_mask
    return scores.softmax(dim=-1) @ value


def _expand(tensor: torch.Tensor, *size: Any) -> torch.Tensor:
    return tensor.expand(*size)


@contextlib.contextmanager
def _expand_for_broadcast_to() -> Iterator[None]:
    import torch

    with (
        mock.patch.object(torch, "broadcast_to", _expand),
        mock.patch.object(torch.Tensor, "broadcast_to", _expand),
    ):
        yield


PATCHES: dict[str, Patch] = {
    "explicit_attention": Patch(
        "below opset 14 the TorchScript exporter stops with UnsupportedOperatorError "
        "'aten::scaled_dot_product_attention'",
        _explicit_attention,
    ),
    "expand_for_broadcast_to": Patch(
        "diffusers before 0.3 calls broadcast_to on the timesteps, which the TorchScript exporter "
        "of its day could not write; from the PhotoRoom article, harmless since",
        _expand_for_broadcast_to,
    ),
}


@contextlib.contextmanager
def applied(names: list[str]) -> Iterator[None]:
    """Apply patches for the time of a block.

    Raises:
        ConfigError: there is no patch of that name.
    """
    unknown = [name for name in names if name not in PATCHES]
    if unknown:
        raise ConfigError(
            f"export.patches: no such patch: {', '.join(unknown)} (conf/export/)",
            expected="any of " + ", ".join(sorted(PATCHES)),
            found=", ".join(names),
            fix="correct export.patches",
        )
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(PATCHES[name].apply())
        yield
