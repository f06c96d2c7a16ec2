"""Words of textual inversion: against diffusers' own loader, and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families.base import Family
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.families.stable_diffusion_xl import FAMILY as SDXL
from diffusion_engines.runtime import sampling
from diffusion_engines.weights.check import count_parameters
from diffusion_engines.weights.embeddings import add_embeddings, read_embedding

PROMPT = "a <lemon> beside <cat>, and a lemon"


class Loader(TextualInversionLoaderMixin):
    """As much of a pipeline as diffusers' loader reads."""

    def __init__(self, folder: Path) -> None:
        self.hf_device_map, self.components = None, dict[str, object]()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "embeddings"
    folder.mkdir()
    torch.manual_seed(0)
    save_file({"<lemon>": torch.randn(32)}, folder / "one.safetensors")
    save_file({"emb_params": torch.randn(3, 32)}, folder / "three.safetensors")
    both = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 64)}
    save_file(both, folder / "both.safetensors")
    return folder


def test_prompts_mean_what_they_mean_in_diffusers(weights_copy: Path, files: Path) -> None:
    diffusers = Loader(weights_copy)
    diffusers.load_textual_inversion(str(files / "one.safetensors"), token="<lemon>")
    diffusers.load_textual_inversion(str(files / "three.safetensors"), token="<cat>")
    prompt = diffusers.maybe_convert_prompt(PROMPT, diffusers.tokenizer)
    ids = diffusers.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
    expected = diffusers.text_encoder(ids.input_ids).last_hidden_state
    before = count_parameters(weights_copy / "text_encoder")

    words = [("one.safetensors", "<lemon>"), ("three.safetensors", "<cat>")]
    read = [read_embedding(files, file, word, FAMILY) for file, word in words]
    added = add_embeddings(read, weights_copy, FAMILY)

    assert [(one.word, one.vectors) for one in added["text_encoder"]] == [
        ("<lemon>", 1),
        ("<cat>", 3),
    ]
    encoder = CLIPTextModel.from_pretrained(weights_copy / "text_encoder")
    model = sampling.load_model(weights_copy)
    networks = {"text_encoder": lambda tokens: encoder(tokens).last_hidden_state}
    (found,) = FAMILY.encode(networks, model, [PROMPT], None, (64, 64), "cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert count_parameters(weights_copy / "text_encoder") == before + 4 * 32


@pytest.mark.parametrize("published", ["as it is", "2"])
def test_the_pooled_embedding_is_still_taken_where_the_text_ends(
    weights_copy: Path, files: Path, published: str
) -> None:
    # 2 in old configs, SDXL's among them, means the largest token, which a new word's is then.
    path = weights_copy / "text_encoder/config.json"
    config = json.loads(path.read_text())
    end = config["eos_token_id"]
    if published == "2":
        path.write_text(json.dumps(config | {"eos_token_id": 2}))
    read = read_embedding(files, "one.safetensors", "<lemon>", FAMILY)
    add_embeddings([read], weights_copy, FAMILY)
    tokenizer = CLIPTokenizer.from_pretrained(weights_copy / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(weights_copy / "text_encoder")
    ids = tokenizer("a <lemon> and more", return_tensors="pt").input_ids
    assert int(ids.max()) > end
    found = encoder(ids)
    place = ids[0].tolist().index(end)
    torch.testing.assert_close(found.pooler_output[0], found.last_hidden_state[0, place])


def test_other_prompts_stay_as_they_were(weights_copy: Path, files: Path) -> None:
    def ids() -> list[int]:
        tokenizer = CLIPTokenizer.from_pretrained(weights_copy / "tokenizer")
        return tokenizer("A naïve <3 lemon, cat_1 & 10% more").input_ids

    before = ids()
    read = read_embedding(files, "one.safetensors", "<lemon>", FAMILY)
    add_embeddings([read], weights_copy, FAMILY)
    assert ids() == before


@pytest.mark.parametrize(
    ("file", "family", "expected"),
    [
        ("both.safetensors", FAMILY, "is no embedding for a StableDiffusionPipeline"),
        ("one.safetensors", SDXL, "is no embedding for a StableDiffusionXLPipeline"),
        ("none.safetensors", FAMILY, "the embedding .* does not exist"),
    ],
)
def test_an_embedding_for_another_kind_of_model_is_refused(
    files: Path, file: str, family: Family, expected: str
) -> None:
    with pytest.raises(WeightsError, match=expected):
        read_embedding(files, file, "<lemon>", family)


def test_two_encoders_take_two_tensors(files: Path) -> None:
    read = read_embedding(files, "both.safetensors", "<lemon>", SDXL)
    assert read.tokens == ["<lemon>", "<lemon>_1"]
    assert {name: len(rows) for name, rows in read.vectors.items()} == {
        "text_encoder": 2,
        "text_encoder_2": 2,
    }


def test_a_vector_of_another_width_and_a_word_that_there_is(
    weights_copy: Path, files: Path
) -> None:
    save_file({"x": torch.randn(768)}, files / "wide.safetensors")
    wide = read_embedding(files, "wide.safetensors", "<wide>", FAMILY)
    with pytest.raises(WeightsError, match="expected: vectors of 32 numbers"):
        add_embeddings([wide], weights_copy, FAMILY)
    known = read_embedding(files, "one.safetensors", "a</w>", FAMILY)
    with pytest.raises(ConfigError, match="has a</w> already"):
        add_embeddings([known], weights_copy, FAMILY)
