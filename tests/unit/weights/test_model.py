"""A model whose engines would compute something else is refused at `download`, in sentences."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_engines.config import Model
from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.runtime.networks import load_network
from diffusion_engines.weights import sources
from diffusion_engines.weights.model import check_model
from tests.conftest import COMPONENTS, ROOT, TINY, load_stage
from tests.models import reduce_architecture

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


def change(model: Path, name: str, **changes: Any) -> None:
    path = model / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(model: Path) -> str:
    with pytest.raises(WeightsError, match=r"engines cannot be built from someone/model") as raised:
        check_model(model, name="someone/model")
    assert str(model) not in raised.value.found
    return raised.value.found


def test_sound_models_pass(tiny_weights: Path) -> None:
    check_model(tiny_weights, name="tiny")
    check_model(ROOT / "models/lemon", name="lemon")
    for folder in (ROOT / "conf/architecture").iterdir():
        check_model(folder, name=folder.name, weights=False)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        # Conditions that the engines have no input for.
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256, not null"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "scheduler lcm"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "is text_time, not null"),
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds is 10, not null"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is timestep"),
        ("unet/config.json", {"encoder_hid_dim": 16}, "encoder_hid_dim is 16, not null"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type is gated, not default"),
        ("unet/config.json", {"num_attention_heads": 4}, "diffusers takes it from no config"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "no input for a mask"),
        # What the networks have to agree on.
        ("unet/config.json", {"in_channels": 9}, "of the UNet: 9; its out_channels"),
        ("unet/config.json", {"in_channels": 9}, "of the UNet: 9; latent_channels of the VAE: 4"),
        ("unet/config.json", {"cross_attention_dim": [32, 64, 64]}, ": [32, 64, 64]; the width"),
        ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim of the UNet: 64; "),
        ("text_encoder/config.json", {"hidden_size": 64}, "(hidden_size): 64"),
        ("text_encoder/config.json", {"vocab_size": 100}, "has a token 513, and the text encoder"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels of the VAE: 16"),
        # What no engine computes.
        ("text_encoder/config.json", {"max_position_embeddings": 248}, "is 248, not 77"),
        ("text_encoder/config.json", {"model_type": "bert"}, "model_type is bert, not clip_text"),
        ("text_encoder/config.json", {"return_dict": False}, "return_dict is False, not True"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean is [0.0, 0.0, 0.0, 0.0]"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1, not null or 0"),
        ("vae/config.json", {"out_channels": 4}, "pictures have three channels"),
        ("vae/config.json", {"quantization_config": {"bits": 4}}, "floating point alone"),
        # What fails in a call alone.
        ("vae/config.json", {"scaling_factor": None}, "vae: cannot be called as engines are: Type"),
        ("unet/config.json", {"norm_eps": "small"}, "unet: cannot be called as engines are: Type"),
        ("vae/config.json", {"up_block_types": []}, "vae: "),
        # Contradictions.
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "_class_name is UNet2DModel, not"),
        ("unet/config.json", {"block_out_channels": [32]}, "no UNet2DConditionModel can be made"),
        ("unet/config.json", {"block_out_channels": "wide"}, "no UNet2DConditionModel can be made"),
        (
            "text_encoder/config.json",
            {"num_attention_heads": 5},
            "not a multiple of the number of attention heads (5)",
        ),
        (
            "text_encoder/config.json",
            {"hidden_size": "wide"},
            "no config of a CLIPTextModel, found",
        ),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 248}, "is 248, not 77"),
        (
            SCHEDULER,
            {"_class_name": "LMSDiscreteScheduler"},
            "scheduler is diffusers.PNDMScheduler",
        ),
        (SCHEDULER, {"beta_schedule": "zigzag"}, "no PNDMScheduler can be made of it: NotImpl"),
        (SCHEDULER, {"steps_offset": "x"}, "no PNDMScheduler can be made of it: "),
        # Other classes.
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet2DModel"]},
            "is diffusers.UNet2DModel, not",
        ),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, "unet is my_unet.MyUNet, not diffus"),
        ("model_index.json", {"unet": [None, None]}, "unet is [None, None], not diffusers.UNet2D"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "BertModel"]},
            "transformers.BertMo",
        ),
        (
            "model_index.json",
            {"vae": ["diffusers", "AsymmetricAutoencoderKL"]},
            "not diffusers.AutoencoderKL or diffusers.AutoencoderTiny",
        ),
        (
            "model_index.json",
            {"tokenizer": ["transformers", "T5Tokenizer"]},
            "tokenizer is transformers.T5Tokenizer, not transformers.CLIPTokenizer",
        ),
    ],
)
def test_what_a_file_says_that_no_engine_does_is_a_sentence(
    weights_copy: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    change(weights_copy, file, **changes)
    assert said in refusal(weights_copy)


@pytest.mark.parametrize(
    ("class_name", "said"),
    [
        ("NoSuchScheduler", "diffusers has no scheduler NoSuchScheduler"),
        ("AutoencoderKL", "diffusers has no scheduler AutoencoderKL"),
        # Schedules that no solver of the family has.
        ("FlowMatchEulerDiscreteScheduler", "keeps to the noise schedule of a FlowMatchEuler"),
        ("EDMDPMSolverMultistepScheduler", "they have another beta_end"),
    ],
)
def test_a_noise_schedule_that_no_solver_keeps_to_is_a_sentence(
    weights_copy: Path, class_name: str, said: str
) -> None:
    change(weights_copy, "model_index.json", scheduler=["diffusers", class_name])
    change(weights_copy, SCHEDULER, _class_name=class_name)
    assert said in refusal(weights_copy)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("unet/config.json", None, "unet/config.json is missing"),
        (
            "unet/config.json",
            b'{"in_channels": 4',
            "unet/config.json is not JSON, found JSONDecode",
        ),
        ("vae/config.json", b"\xff\xfe", "vae/config.json is not JSON, found UnicodeDecodeError"),
        ("text_encoder/config.json", b"[]", "text_encoder/config.json is no config, expected an"),
        (SCHEDULER, None, "scheduler/scheduler_config.json is missing"),
        (UNET, None, "unet has no safetensors weights"),
        ("tokenizer/vocab.json", None, "tokenizer: tokenizer.json or vocab.json and merges.txt"),
        ("tokenizer/merges.txt", b"", "tokenizer: tokenizer.json or vocab.json and merges.txt"),
        ("tokenizer/vocab.json", b"{}", "tokenizer: no CLIPTokenizer can be made of it: "),
        ("tokenizer/vocab.json", b'{"a": 0', "tokenizer: no CLIPTokenizer can be made of it: "),
        # Without it, prompts have no length.
        ("tokenizer/tokenizer_config.json", None, "tokenizer: model_max_length is 10"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_a_sentence(
    weights_copy: Path, file: str, content: bytes | None, said: str
) -> None:
    (weights_copy / file).unlink()
    if content is not None:
        (weights_copy / file).write_bytes(content)
    assert said in refusal(weights_copy)


def test_a_model_without_its_tokenizer_is_refused(weights_copy: Path) -> None:
    shutil.rmtree(weights_copy / "tokenizer")
    assert "merges.txt missing or empty" in refusal(weights_copy)
    shutil.copytree(ROOT / "models/lemon/tokenizer", weights_copy / "tokenizer")  # of another model
    assert "has a token 653, and the text encoder's vocab_size is 514" in refusal(weights_copy)


def test_what_sdxl_has_besides_fits_too(tmp_path: Path) -> None:
    reduce_architecture(ROOT / "conf/architecture/sdxl", tmp_path / "sdxl")
    check_model(tmp_path / "sdxl", name="sdxl", weights=False)
    # The pooled embedding is that of the end of a text.
    change(tmp_path / "sdxl", "text_encoder_2/config.json", eos_token_id=7, projection_dim=12)
    change(tmp_path / "sdxl", "unet/config.json", addition_embed_type=None)
    change(tmp_path / "sdxl", "vae/config.json", latents_mean=[0.0] * 3)
    with pytest.raises(WeightsError) as raised:
        check_model(tmp_path / "sdxl", name="sdxl", weights=False)
    for said in (
        "tokenizer_2: ends a text with 49407, and text_encoder_2 looks for 7",
        "projection_dim of text_encoder_2 and 6 times its addition_time_embed_dim: 204",
        "addition_embed_type is null, not text_time",
        "latents_mean and latents_std of the VAE: [3, 0]; its latent_channels: [4, 4]",
    ):
        assert said in raised.value.found


def test_everything_that_is_wrong_is_said_at_once(weights_copy: Path) -> None:
    change(weights_copy, "unet/config.json", encoder_hid_dim=16, attention_type="gated")
    change(weights_copy, "vae/config.json", shift_factor=0.1)
    (weights_copy / "tokenizer/vocab.json").unlink()
    (weights_copy / SCHEDULER).write_text("")
    found = refusal(weights_copy).splitlines()
    beginnings = ("unet/config.json: e", "unet/config.json: a", "vae/", "tokenizer:", "scheduler/")
    assert all(any(line.startswith(text) for line in found) for text in beginnings)


def test_a_pipeline_whose_code_comes_with_the_model_is_refused(weights_copy: Path) -> None:
    change(weights_copy, "model_index.json", _class_name=["my_pipeline", "MyPipeline"])
    with pytest.raises(ConfigError, match="no engines are built for"):
        check_model(weights_copy, name="someone/model")


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.wieght"] = tensors.pop("conv_in.weight")


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"].transpose(0, 1).contiguous()


def added(tensors: dict[str, torch.Tensor]) -> None:
    tensors["time_embedding.cond_proj.weight"] = torch.zeros(128, 256)


def in_8_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (renamed, "unet: conv_in.weight is missing"),
        (renamed, "unet: conv_in.wieght is not in a UNet2DConditionModel of its config"),
        (transposed, "conv_in.weight has the shape (4, 32, 3, 3), not (32, 4, 3, 3)"),
        (added, "unet: time_embedding.cond_proj.weight is not in"),
        (in_8_bits, "unet: weights in F8_E4M3, not in F64, F32, F16, BF16"),
    ],
)
def test_tensors_have_the_names_and_shapes_of_the_network(
    weights_copy: Path, damage: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    tensors = load_file(weights_copy / UNET)
    damage(tensors)
    save_file(tensors, weights_copy / UNET)
    assert said in refusal(weights_copy)


def test_names_of_earlier_libraries_are_those_that_they_still_read(weights_copy: Path) -> None:
    def loaded() -> list[torch.Tensor]:
        names = ("text_encoder", "vae_decoder")
        parts = {name: weights_copy / COMPONENTS[name].folder for name in names}
        modules = [load_network(COMPONENTS[name], at, "fp32") for name, at in parts.items()]
        return [parameter for module in modules for parameter in module.parameters()]

    before = loaded()
    # As every published text encoder has them, and the VAEs of 2022.
    text = load_file(weights_copy / TEXT)
    older = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in text.items()}
    older["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(older, weights_copy / TEXT, metadata={"format": "pt"})
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, old))})\.")
    older = {
        pattern.sub(lambda match: f".{old[match[1]]}.", name): tensor
        for name, tensor in load_file(weights_copy / VAE).items()
    }
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in older
    save_file(older, weights_copy / VAE, metadata={"format": "pt"})
    check_model(weights_copy, name="older")
    torch.testing.assert_close(loaded(), before, rtol=0, atol=0)


def test_an_index_that_does_not_fit_its_shards_is_a_sentence(weights_copy: Path) -> None:
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (weights_copy / UNET).rename(weights_copy / "unet" / shard)
    index = weights_copy / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    check_model(weights_copy, name="sharded")
    index.write_text(json.dumps({"weight_map": {"conv_on.weight": shard}}))
    assert f"does not fit its shards, expected conv_on.weight in {shard}" in refusal(weights_copy)


def test_a_hub_gives_no_weights_of_a_model_that_is_refused(
    tiny_weights: Path, weights_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage("download")
    fetched: list[int] = []

    def fetch(repo: str, revision: str, wanted: Sequence[str], destination: Path) -> None:
        sources._copy_wanted(hub, wanted, destination)
        fetched.append(len([*destination.rglob("*.safetensors")]))

    monkeypatch.setattr(sources, "copy_from_hub", fetch)
    model = Model(
        name="tiny",
        source="hub",
        folder=str(TINY),
        checkpoint=str(TINY),
        repo="someone/model",
        revision="0123456",
        seed=0,
        dtype="fp32",
        clip_skip=0,
        parameters={},
        lora_folder="",
        loras=[],
        embeddings=[],
    )
    hub = tiny_weights
    stage.fill(model, tmp_path / "sound")
    assert fetched == [0, 3]
    hub = weights_copy
    change(hub, "unet/config.json", num_class_embeds=10)
    with pytest.raises(WeightsError, match="cannot be built from someone/model at 0123456"):
        stage.fill(model, tmp_path / "refused")
    assert fetched == [0, 3, 0]
