"""Check safetensors weights before anything is built on them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        with _opened(path) as tensors:
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
    return parameters


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        file: that holds it.
        dtype: as safetensors writes it, e.g. ``F16``.
        shape: of it.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of one network by name, without reading them.

    Raises:
        WeightsError: as of :func:`count_parameters`, but for values; or a file does not hold what
            the index of the shards says.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        with _opened(path) as tensors:
            for name in sorted(tensors.keys()):
                view = tensors.get_slice(name)
                found[name] = Stored(path.name, view.get_dtype(), tuple(view.get_shape()))
    for stem in _STEMS:
        if not (folder / f"{stem}.safetensors").is_file():
            index = folder / f"{stem}.safetensors.index.json"
            for name, shard in _weight_map(index).items() if index.is_file() else ():
                if name not in found or found[name].file != shard:
                    raise WeightsError(
                        f"{index} does not fit its shards",
                        expected=f"{name} in {shard}",
                        found=found[name].file if name in found else "no such tensor",
                        fix="get the model again",
                    )
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file",
            found=f"{path.stat().st_size} bytes; {error}",
            fix="it was probably truncated by an interrupted copy: get it again",
        ) from error


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
            shards = sorted(set(_weight_map(index).values()))
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


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index of a network's shards has it."""
    try:
        files = dict(json.loads(index.read_text())["weight_map"].items())
        # Alone the names that diffusers and transformers write are copied; others could also lead
        # out of the folder.
        stem = index.name.removesuffix(".safetensors.index.json")
        shard = re.compile(re.escape(stem) + r"-[\w.-]+-of-[\w.-]+\.safetensors")
        if wrong := [name for name in files.values() if not shard.fullmatch(name)]:
            raise ValueError(f"a shard called {wrong[0]!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is not an index of shards",
            expected='JSON with a "weight_map" from tensors to files beside it, such as\n'
            f"{index.name.removesuffix('.safetensors.index.json')}-00001-of-00002.safetensors",
            found=f"{index.stat().st_size} bytes; {type(error).__name__}: {error}",
            fix="it was probably truncated by an interrupted copy: get it again; shards of other\n"
            "names get these by load_file and save_pretrained in diffusers",
        ) from error
    return files


def check_parameters(name: str, expected: int | None, found: int) -> None:
    """Raise WeightsError where a network has another number of parameters than the config says."""
    if expected is not None and found != expected:
        raise WeightsError(
            f"{name} is of another architecture than model.parameters says",
            expected=f"{expected:,} parameters",
            found=f"{found:,} parameters",
            fix="correct model.parameters in conf/model/, or take the right checkpoint",
        )
