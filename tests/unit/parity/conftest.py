"""A CLIP model as small as it can be, with random weights, in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("scorers") / "clip"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "conf/architecture/tiny/tokenizer")
    width = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config=width | text,
        vision_config=width | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        # Random directions: turn the images' to the texts' half, for scores are at least 0.
        model.visual_projection.weight.data.mul_(-1)
        model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
