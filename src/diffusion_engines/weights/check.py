"""Check safetensors weights before anything is built on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusion_engines.errors import WeightsError
from diffusion_engines.progress import progress

_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


def count_parameters(folder: Path) -> int:
    """Read every tensor of one network; return how many parameters it has.

    Raises:
        WeightsError: no safetensors, a missing or truncated shard, or a NaN or infinity.
    """
    parameters = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in progress(sorted(tensors.keys()), f"check {folder.name}/{path.name}"):
                    tensor = tensors.get_tensor(name)
                    if not tensor.is_floating_point():
                        continue  # position ids, which old checkpoints carry
                    if not _is_finite(tensor):
                        raise WeightsError(
                            f"{path}: {name} has NaN or infinite values",
                            fix="get the checkpoint again; if it was trained or merged here, that\n"
                            "step overflowed (fp16 is the usual cause)",
                        )
                    parameters += tensor.numel()
        except SafetensorError as error:
            raise WeightsError(
                f"{path} is not a whole safetensors file",
                found=f"{path.stat().st_size} bytes; {error}",
                fix="it was probably truncated by an interrupted copy: get it again",
            ) from error
    return parameters


def _is_finite(tensor: torch.Tensor) -> bool:
    # The sum of absolute values is NaN or Inf if any value is, in one pass without a mask; fp64
    # so that many large finite values do not overflow.
    return all(
        bool(torch.isfinite(chunk.abs().sum(dtype=torch.float64)))
        for chunk in torch.split(tensor.flatten(), 1 << 24)
    )


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the safetensors files of one network: a single file, or all shards of its index.

    Raises:
        WeightsError: there are none, or a shard is missing.
    """
    for stem in _STEMS:
        if (path := folder / f"{stem}.safetensors").is_file():
            yield path
            return
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            shards = _shards(index)
            for shard in shards:
                if not (folder / shard).is_file():
                    raise WeightsError(
                        f"{folder / shard} is missing",
                        expected=f"{len(shards)} shards, as {index.name} lists them",
                        found=", ".join(p.name for p in sorted(folder.glob("*.safetensors"))),
                        fix="get the missing shard; an interrupted download can be resumed",
                    )
            yield from (folder / shard for shard in shards)
            return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    variants = sorted(path.name for path in folder.glob("*.safetensors"))
    raise WeightsError(
        f"{folder} has no safetensors weights",
        expected=f"{_STEMS[0]}.safetensors (text encoders: {_STEMS[1]}.safetensors)",
        found=", ".join(pickles + variants) or "no weights",
        fix="pickled weights can run code when loaded and are not read here: load the model once\n"
        "with diffusers where you trust it, and save_pretrained(…, safe_serialization=True)"
        if pickles
        else "complete the folder, or set model.source to `hub` or `synthetic`",
    )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is not an index of shards",
            expected='JSON with a "weight_map" from tensors to files',
            found=f"{index.stat().st_size} bytes; {type(error).__name__}: {error}",
            fix="it was probably truncated by an interrupted copy: get it again",
        ) from error


def check_parameters(name: str, expected: int | None, found: int) -> None:
    """Raise WeightsError where a network has another number of parameters than the config says."""
    if expected is not None and found != expected:
        raise WeightsError(
            f"{name} is of another architecture than model.parameters says",
            expected=f"{expected:,} parameters",
            found=f"{found:,} parameters",
            fix="correct model.parameters in conf/model/, or take the right checkpoint",
        )
