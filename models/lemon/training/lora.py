"""Train a LoRA for models/lemon, `loras/ink.safetensors`: every picture in blue ink on paper.

`python models/lemon/training/lora.py loras/ink.safetensors`: 160 s on an H100 (2026-11-24). Trained
on lemon's own drawings, redrawn in ink, with captions that say nothing of it, so that only the LoRA
does. Written in the format of diffusers' training scripts.
"""

from __future__ import annotations

import argparse
import os
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from drawing import draw
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from scenes import caption_from_scene, random_scene
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

MODEL = Path(__file__).resolve().parents[1]
PAPER, INK = np.array([0.97, 0.96, 0.92]), np.array([0.05, 0.12, 0.45])
# Attention, and what a change of all colours needs beside it.
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv_in", "conv_out"]


def main() -> None:
    """Train for as many steps as were asked for, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scenes", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--uncaptioned", type=float, default=0.1, help="share, for guidance")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    latents, text, no_text = _examples(args.scenes, device)
    schedule = DDPMScheduler.from_pretrained(MODEL / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32)
    unet.to(device).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    bar = tqdm(range(args.steps), mininterval=5)
    for _ in bar:
        chosen = torch.randint(len(latents), (args.batch_size,), device=device)
        timesteps = torch.randint(
            schedule.config.num_train_timesteps, (args.batch_size,), device=device
        )
        noise = torch.randn_like(latents[chosen])
        noisy = schedule.add_noise(latents[chosen], noise, timesteps)
        blank = torch.rand(args.batch_size, 1, 1, device=device) < args.uncaptioned
        condition = torch.where(blank, no_text, text[chosen])
        loss = F.mse_loss(unet(noisy, timesteps, condition).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        bar.set_postfix(loss=f"{loss.detach().item():.4f}", refresh=False)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        args.file.parent,
        unet_lora_layers={key: value.half().cpu() for key, value in layers.items()},
        weight_name=args.file.name,
    )
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.2f} MB, last loss {loss.item():.4f}")


@torch.no_grad()
def _examples(count: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled latents (count, 4, 32, 32) of drawings in ink, their captions and an empty one.

    The captions are (count, 77, 128), the empty one (1, 77, 128).
    """
    random = Random("ink")
    scenes = [random_scene(random, held_out=False) for _ in range(count)]
    captions = [caption_from_scene(scene, random) for scene in scenes]
    with Pool(os.cpu_count(), initializer=_one_thread) as pool:
        pictures = np.stack([_in_ink(picture) for picture in pool.map(draw, scenes, chunksize=64)])
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).to(device)
    batches = (2 * torch.from_numpy(pictures).float().permute(0, 3, 1, 2) - 1).split(64)
    latents = torch.cat([vae.encode(batch.to(device)).latent_dist.mean for batch in batches])
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).to(device)

    def encode(texts: list[str]) -> torch.Tensor:
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids
        return torch.cat(
            [encoder(batch.to(device)).last_hidden_state for batch in torch.tensor(ids).split(512)]
        )

    return latents * vae.config.scaling_factor, encode(captions), encode([""])


def _in_ink(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The picture's darkness in blue on paper; (128, 128, 3), 0 to 1."""
    light = (picture / 255.0) @ np.array([0.299, 0.587, 0.114])
    return (INK + light[..., None] * (PAPER - INK)).astype(np.float32)


def _one_thread() -> None:
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
