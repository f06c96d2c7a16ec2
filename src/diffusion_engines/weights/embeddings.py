"""Add words to a model's vocabulary: embeddings that textual inversion learned (arXiv:2208.01618).

A word stands for one vector or several. Its tokens go to the tokenizer and its vectors to the text
encoder, so that engines, bundles and prompts have it like any other word.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families.base import Family
from diffusion_engines.files import new_file, sha256_of_file
from diffusion_engines.manifests import AddedWord
from diffusion_engines.weights.check import weight_files
from diffusion_engines.weights.lora import read_tensors

# Files for several text encoders name them so, in the order in which a family has them.
_ENCODERS = ("clip_l", "clip_g")
_TABLE = "embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Embedding:
    """A learned word, read: ``vectors`` (count, width) by the text encoder's folder."""

    file: str
    sha256: str
    word: str
    vectors: Mapping[str, torch.Tensor]

    @property
    def tokens(self) -> list[str]:
        """The word, and what the tokenizer has for each further vector, as diffusers names them."""
        count = len(next(iter(self.vectors.values())))
        return [self.word, *(f"{self.word}_{index}" for index in range(1, count))]


def read_embedding(folder: Path, file: str, word: str, family: Family) -> Embedding:
    """Read the vectors of a word from ``folder / file``.

    Args:
        folder: that DVC watches.
        file: safetensors, relative to it: one tensor of (width,) or (count, width) for a model with
            one text encoder; ``clip_l`` and ``clip_g`` for one with two.
        word: by which prompts will name it.
        family: of the model.

    Raises:
        WeightsError: the file is missing, is no safetensors, has a NaN, or is for another family.
    """
    path = folder / file
    tensors, _ = read_tensors(path, folder, "embedding", "model.embeddings")
    encoders = [family.components[name].folder for name in family.tokenizers]
    if len(encoders) == len(tensors) == 1:
        found = {encoders[0]: next(iter(tensors.values()))}
    else:
        found = {
            encoder: tensors[name]
            for encoder, name in zip(encoders, _ENCODERS, strict=False)
            if name in tensors
        }
    vectors = {
        encoder: tensor[None] if tensor.ndim == 1 else tensor for encoder, tensor in found.items()
    }
    if (
        len(found) != len(tensors)
        or len(found) != len(encoders)
        or any(tensor.ndim != 2 for tensor in vectors.values())
        or len({len(tensor) for tensor in vectors.values()}) != 1
    ):
        names = ", ".join(_ENCODERS[: len(encoders)])
        raise WeightsError(
            f"{path} is no embedding for a {family.class_name}",
            expected="one tensor of (width,) or (vectors, width)"
            if len(encoders) == 1
            else f"{names}, each of (vectors, width), and as many vectors in each",
            found=", ".join(f"{name} {tuple(t.shape)}" for name, t in sorted(tensors.items()))[
                :300
            ],
            fix="take one that was trained on this kind of model, or remove it from\n"
            "model.embeddings (conf/lora/)",
        )
    return Embedding(file, sha256_of_file(path), word, vectors)


def add_embeddings(
    embeddings: Sequence[Embedding], weights: Path, family: Family
) -> dict[str, tuple[AddedWord, ...]]:
    """Add words to tokenizers and text encoders, in place; return them by the encoder's folder.

    Raises:
        ConfigError: the tokenizer has such a word already.
        WeightsError: a vector is of another width than the encoder's; then the folder is of no use.
    """
    tokens = [token for one in embeddings for token in one.tokens]
    words = tuple(AddedWord(e.file, e.sha256, e.word, len(e.tokens)) for e in embeddings)
    added = {}
    for name, tokenizer in family.tokenizers.items():
        encoder = family.components[name].folder
        first, end = _extend_vocabulary(tokens, weights / tokenizer)
        _extend_table(embeddings, weights / encoder, first, end)
        added[encoder] = words
    return added


def _extend_vocabulary(tokens: Sequence[str], folder: Path) -> tuple[int, int]:
    """Add tokens to a tokenizer; return the id of the first, and of the end of a text."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    first = len(tokenizer)
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise ConfigError(
            f"model.embeddings: the vocabulary has {known[0]} already",
            expected="a word that no prompt has by chance, such as <lemon-style>",
            found=known[0],
            fix="choose another word (conf/lora/)",
        )
    tokenizer.add_tokens(list(tokens))
    shutil.rmtree(folder)  # vocab.json and merges.txt, which tokenizer.json stands for from now on
    tokenizer.save_pretrained(folder)
    return first, tokenizer.eos_token_id


def _extend_table(embeddings: Sequence[Embedding], folder: Path, first: int, end: int) -> None:
    for path in list(weight_files(folder)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = next((name for name in tensors if name.endswith(_TABLE)), None)
        if name is None:
            continue  # a shard without it
        table = tensors[name]
        for one in embeddings:
            if (width := one.vectors[folder.name].shape[1]) != table.shape[1]:
                raise WeightsError(
                    f"the embedding {one.file} is for another model",
                    expected=f"vectors of {table.shape[1]} numbers, as the {folder.name} has",
                    found=f"{width}",
                    fix="take one that was trained on this model or on one of the same\n"
                    "architecture",
                )
        rows = [one.vectors[folder.name].to(table.dtype) for one in embeddings]
        # A table may be longer than its vocabulary; ids decide where a row belongs.
        tensors[name] = torch.cat([table[:first], *rows])
        with new_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)
        config = folder / "config.json"
        settings = json.loads(config.read_text())
        settings["vocab_size"] = len(tensors[name])
        # Where a pooled embedding is taken. Old configs have a 2, which transformers reads as "the
        # largest token" (https://github.com/huggingface/transformers/pull/24773): now a new word's.
        settings["eos_token_id"] = end
        config.write_text(json.dumps(settings, indent=2) + "\n")
