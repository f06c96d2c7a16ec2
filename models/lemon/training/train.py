"""Train models/lemon: drawings, tokenizer, marker, autoencoder, then UNet and text encoder.

`python models/lemon/training/train.py` runs every step; `steps=[evaluate]` one of them. Training
steps write checkpoints into `work` and go on from there when they are started again.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import hydra
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from drawing import SIZE, draw
from marker import Marker
from omegaconf import DictConfig
from PIL import Image
from scenes import ATTRIBUTES, caption_from_scene, labels_from_scene, random_scene
from tokenizer import train_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 77


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run ``cfg.steps`` in their order."""
    Path(cfg.work).mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name in cfg.steps:
        started = time.monotonic()
        torch.manual_seed(cfg.seed)
        finished = STEPS[name](cfg)
        minutes = (time.monotonic() - started) / 60
        with (Path(cfg.work) / "minutes.csv").open("a") as file:
            file.write(f"{name},{minutes:.2f}\n")
        print(f"{name}: {minutes:.1f} min{'' if finished else ', not finished'}", flush=True)
        if not finished:
            return


# ---- data ----


def make_data(cfg: DictConfig) -> bool:
    """Draw the scenes: pictures (n, 128, 128, 3) uint8, captions, and what they show."""
    folder = Path(cfg.work)
    for split, count, held_out in (
        ("train", cfg.data.scenes, False),
        ("held_out", cfg.data.held_out, True),
    ):
        random = Random(f"{cfg.seed}-{split}")
        scenes = [random_scene(random, held_out=held_out) for _ in range(count)]
        with Pool(os.cpu_count(), initializer=_one_thread) as pool:
            pictures = pool.map(draw, scenes, chunksize=64)
        np.save(folder / f"{split}.npy", np.stack(pictures))
        captions = [
            [caption_from_scene(s, random) for _ in range(cfg.data.captions)] for s in scenes
        ]
        marked = [caption_from_scene(s, random, exact=True) for s in scenes]
        rows = [
            {"labels": labels_from_scene(s), "captions": c, "exact": e}
            for s, c, e in zip(scenes, captions, marked, strict=True)
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return True


def _one_thread() -> None:
    torch.set_num_threads(1)


def _rows(cfg: DictConfig, split: str) -> list[dict[str, Any]]:
    return json.loads((Path(cfg.work) / f"{split}.json").read_text())


def _pictures(cfg: DictConfig, split: str) -> torch.Tensor:
    return torch.from_numpy(np.load(Path(cfg.work) / f"{split}.npy")).to(cfg.device)


def _normalized(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to (n, 3, h, w) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _labels(cfg: DictConfig, split: str) -> dict[str, torch.Tensor]:
    rows = _rows(cfg, split)
    return {
        name: torch.tensor([row["labels"][name] for row in rows], device=cfg.device)
        for name in ATTRIBUTES
    }


def make_tokenizer(cfg: DictConfig) -> bool:
    """Learn the vocabulary from the captions, and write its size into the text encoder's config."""
    captions = [text for row in _rows(cfg, "train") for text in row["captions"]]
    size = train_tokenizer(captions, Path(cfg.model) / "tokenizer", cfg.tokenizer.vocabulary)
    path = Path(cfg.model) / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config |= {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return True


# ---- training ----


def _run(
    cfg: DictConfig,
    name: str,
    modules: dict[str, torch.nn.Module],
    averaged: dict[str, torch.nn.Module],
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    weight_decay: float = 0.0,
) -> bool:
    """Minimize ``loss_of(step)["loss"]``; resumes, and stops in time when ``cfg.minutes`` is set.

    AdamW, 5 % warm-up, then a cosine to zero. ``averaged`` follows ``modules`` as an exponential
    moving average.
    """
    settings = cfg[name]
    decay = settings.get("ema_decay", 0.0)
    parameters = [p for module in modules.values() for p in module.parameters()]
    means = [p for module in averaged.values() for p in module.parameters()]
    sources = [p for key in averaged for p in modules[key].parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
    )
    path = Path(cfg.work) / f"{name}.pt"
    first, log = 0, []
    if path.exists():
        state = torch.load(path, map_location=cfg.device, weights_only=True)
        first, log = state["step"], state["log"]
        optimizer.load_state_dict(state["optimizer"])
        for kind, group in (("modules", modules), ("averaged", averaged)):
            for key, module in group.items():
                module.load_state_dict(state[kind][key])

    def save(step: int) -> None:
        state = {
            "step": step,
            "log": log,
            "optimizer": optimizer.state_dict(),
            "modules": {k: m.state_dict() for k, m in modules.items()},
            "averaged": {k: m.state_dict() for k, m in averaged.items()},
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    warmup = max(1, settings.steps // 20)
    started = time.monotonic()
    sums: dict[str, torch.Tensor] = {}
    counted = 0
    for step in range(first, settings.steps):
        progress = max(0, step - warmup) / max(1, settings.steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        # A generator per step would be slow on the GPU; this makes a resumed run draw other noise
        # than the one that was stopped, and nothing else.
        losses = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if means:
            now = min(decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(means, sources, 1 - now)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0) + value.detach()
        counted += 1
        if (step + 1) % 50 == 0:
            row = {k: float(v) / counted for k, v in sums.items()}
            sums, counted = {}, 0
            log.append({"step": step + 1, **row})
            if (step + 1) % 500 == 0 or step + 1 == first + 50:
                rate = (step + 1 - first) / (time.monotonic() - started)
                values = "  ".join(f"{k} {v:.5f}" for k, v in row.items())
                print(f"{name} {step + 1}/{settings.steps}  {values}  {rate:.1f} it/s", flush=True)
        out_of_time = cfg.minutes and time.monotonic() - started > 60 * cfg.minutes
        if (step + 1) % 2000 == 0 or step + 1 == settings.steps or out_of_time:
            save(step + 1)
            if out_of_time:
                break
    with (Path(cfg.work) / f"{name}-losses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[0]) if log else ["step"])
        writer.writeheader()
        writer.writerows(log)
    return not (settings.steps > first and step + 1 < settings.steps)


def _architecture(cfg: DictConfig, name: str) -> dict[str, Any]:
    return json.loads((Path(cfg.model) / name / "config.json").read_text())


def _compiled(cfg: DictConfig, function: Any) -> Any:
    return torch.compile(function) if cfg.compile else function


def _autocast(cfg: DictConfig) -> torch.autocast:
    return torch.autocast(cfg.device, dtype=torch.bfloat16)


def _batches(cfg: DictConfig, count: int, size: int) -> Iterator[torch.Tensor]:
    while True:
        yield torch.randint(count, (size,), device=cfg.device)


def train_vae(cfg: DictConfig) -> bool:
    """Autoencoder: L1 of pixels and of their differences, and a faint KL term."""
    vae = AutoencoderKL.from_config(_architecture(cfg, "vae")).to(cfg.device)
    mean = AutoencoderKL.from_config(_architecture(cfg, "vae")).to(cfg.device)
    mean.load_state_dict(vae.state_dict())
    vae.to(memory_format=torch.channels_last)
    pictures = _pictures(cfg, "train")
    batches = _batches(cfg, len(pictures), cfg.vae.batch_size)

    def losses(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = vae.encode(image).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
        error = decoded - image
        edges = sum(
            (error[..., step:, :] - error[..., :-step, :]).abs().mean()
            + (error[..., step:] - error[..., :-step]).abs().mean()
            for step in (1, 2, 4)
        )
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean(), edges / 6, kl

    compiled = _compiled(cfg, losses)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        image = _normalized(pictures[next(batches)]).contiguous(memory_format=torch.channels_last)
        with _autocast(cfg):
            pixels, edges, kl = compiled(image)
        total = pixels + cfg.vae.gradient_weight * edges + cfg.vae.kl_weight * kl
        return {"loss": total, "pixels": pixels, "edges": edges, "kl": kl}

    if not _run(cfg, "vae", {"vae": vae}, {"vae": mean}, loss_of):
        return False
    mean.half().save_pretrained(Path(cfg.model) / "vae")
    return True


@torch.no_grad()
def encode_latents(cfg: DictConfig) -> bool:
    """Encode every training picture; write the latents' scale into the VAE's config."""
    folder = Path(cfg.model) / "vae"
    vae = AutoencoderKL.from_pretrained(folder).to(cfg.device)
    pictures = _pictures(cfg, "train")
    parameters = []
    for chunk in pictures.split(500):
        with _autocast(cfg):
            parameters.append(vae.encode(_normalized(chunk)).latent_dist.parameters.half())
    latents = torch.cat(parameters)
    scale = 1 / latents[:, :4].float().std().item()
    torch.save(latents.cpu(), Path(cfg.work) / "latents.pt")
    config = json.loads((folder / "config.json").read_text()) | {"scaling_factor": round(scale, 5)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    held_out = _normalized(_pictures(cfg, "held_out"))
    errors = []
    for chunk in held_out.split(250):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((decoded - chunk) / 2).square().mean((1, 2, 3)))
    psnr = -10 * torch.cat(errors).log10().mean()
    (Path(cfg.work) / "vae.json").write_text(json.dumps({"psnr_dB": round(psnr.item(), 2)}))
    print(f"scaling factor {scale:.4f}, held-out PSNR {psnr:.2f} dB", flush=True)
    return True


def train_diffusion(cfg: DictConfig) -> bool:
    """UNet and text encoder: the noise in noisy latents, from the words."""
    folder, device, settings = Path(cfg.model), cfg.device, cfg.diffusion
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scale = _architecture(cfg, "vae")["scaling_factor"]
    schedule = DDPMScheduler.from_config(_architecture_of_scheduler(folder))
    alphas = schedule.alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    weights = torch.clamp(snr, max=settings.min_snr_gamma) / snr

    def make() -> dict[str, torch.nn.Module]:
        text_config = CLIPTextConfig.from_dict(_architecture(cfg, "text_encoder"))
        return {
            "unet": UNet2DConditionModel.from_config(_architecture(cfg, "unet")).to(device),
            "text_encoder": CLIPTextModel(text_config).to(device),
        }

    modules, means = make(), make()
    modules["unet"].to(memory_format=torch.channels_last)
    for key, module in means.items():
        module.load_state_dict(modules[key].state_dict())
    moments = torch.load(Path(cfg.work) / "latents.pt", weights_only=True).to(device)
    rows = _rows(cfg, "train")
    texts = [text for row in rows for text in row["captions"]]
    tokens = _tokens(tokenizer, texts).reshape(len(rows), -1, TOKENS).to(device)
    empty = _tokens(tokenizer, [""]).to(device)
    batches = _batches(cfg, len(rows), settings.batch_size)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        text = modules["text_encoder"](ids).last_hidden_state
        return modules["unet"](noisy, timesteps, text).sample

    compiled = _compiled(cfg, predict)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        index = next(batches)
        n = len(index)
        mean, log_variance = moments[index].float().chunk(2, dim=1)
        sample = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance.clamp(-30, 20))
        latents = (sample * scale).contiguous(memory_format=torch.channels_last)
        ids = tokens[index, torch.randint(tokens.shape[1], (n,), device=device)].long()
        dropped = torch.rand(n, device=device) < settings.empty_captions
        ids = torch.where(dropped[:, None], empty.long(), ids)
        timesteps = torch.randint(1000, (n,), device=device)
        noise = torch.randn_like(latents)
        a = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        with _autocast(cfg):
            predicted = compiled(noisy, timesteps, ids)
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        return {"loss": (error * weights[timesteps]).mean(), "mse": error.mean()}

    if not _run(cfg, "diffusion", modules, means, loss_of, weight_decay=0.01):
        return False
    for key, module in means.items():
        module.half().save_pretrained(folder / key)
    return True


def _architecture_of_scheduler(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (len(texts), 77), int16."""
    known = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = tokenizer(list(known), padding="max_length", max_length=TOKENS, truncation=True).input_ids
    table = torch.tensor(ids, dtype=torch.int16)
    return table[torch.tensor([known[text] for text in texts])]


# ---- marks ----


def train_marker(cfg: DictConfig) -> bool:
    """The marker that says what a drawing shows, from drawings as they are and blurred ones."""
    marker = Marker().to(cfg.device, memory_format=torch.channels_last)
    pictures, labels = _pictures(cfg, "train"), _labels(cfg, "train")
    batches = _batches(cfg, len(pictures), cfg.classifier.batch_size)
    compiled = _compiled(cfg, marker)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        index = next(batches)
        image = _normalized(pictures[index])
        if step % 2:  # what comes out of an autoencoder is softer
            size = int(torch.randint(SIZE // 2, SIZE, ()))
            small = F.interpolate(image, size=(size - size % 16,) * 2, mode="area")
            image = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
        image = image + 0.03 * torch.rand((), device=cfg.device) * torch.randn_like(image)
        with _autocast(cfg):
            marks = compiled(image.contiguous(memory_format=torch.channels_last))
        loss = sum(
            F.cross_entropy(marks[name].float(), labels[name][index], label_smoothing=0.02)
            for name in ATTRIBUTES
        )
        return {"loss": loss}

    if not _run(cfg, "classifier", {"marker": marker}, {}, loss_of, weight_decay=0.02):
        return False
    torch.save(marker.state_dict(), Path(cfg.work) / "marker.pt")
    pictures = _normalized(_pictures(cfg, "held_out"))
    print("marks on held-out drawings:", accuracy(mark(cfg, pictures), _labels(cfg, "held_out")))
    return True


@torch.no_grad()
def mark(cfg: DictConfig, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Class index per attribute of images (n, 3, 128, 128) in [-1, 1]."""
    marker = Marker().to(cfg.device).eval()
    state = torch.load(Path(cfg.work) / "marker.pt", map_location=cfg.device, weights_only=True)
    marker.load_state_dict(state)
    chunks = [marker(chunk.to(cfg.device)) for chunk in images.split(250)]
    return {name: torch.cat([chunk[name] for chunk in chunks]).argmax(1) for name in ATTRIBUTES}


def accuracy(marks: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of right marks in percent; relations count only where there is one."""
    result = {}
    for name in ATTRIBUTES:
        right = marks[name] == labels[name]
        if name == "relation":
            right = right[labels["anchor"] > 0]
        result[name] = round(100 * right.float().mean().item(), 1)
    return result


@torch.no_grad()
def evaluate(cfg: DictConfig) -> bool:
    """Draw held-out captions with the files as shipped, and mark the pictures."""
    settings, work = cfg.evaluation, Path(cfg.work)
    rows = _rows(cfg, "held_out")[: settings.captions]
    labels = {k: v[: settings.captions] for k, v in _labels(cfg, "held_out").items()}
    real = _normalized(_pictures(cfg, "held_out")[: settings.captions])
    pipeline = StableDiffusionPipeline.from_pretrained(
        cfg.model, safety_checker=None, torch_dtype=torch.float32
    )
    pipeline.to(cfg.device)
    pipeline.set_progress_bar_config(disable=True)
    decoded = torch.cat(
        [
            pipeline.vae(chunk, sample_posterior=False).sample.clamp(-1, 1)
            for chunk in real.split(100)
        ]
    )
    table = {
        "drawings": accuracy(mark(cfg, real), labels),
        "autoencoded": accuracy(mark(cfg, decoded), labels),
    }
    for scheduler, steps, guidance in settings.runs:
        name = f"{scheduler.removesuffix('Scheduler')}, {steps} steps, guidance {guidance}"
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        images = []
        for start in range(0, len(rows), settings.batch_size):
            prompts = [row["exact"] for row in rows[start : start + settings.batch_size]]
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
            output = pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="pt",
            )
            images.append(output.images.float().cpu() * 2 - 1)
        samples = torch.cat(images)
        table[name] = accuracy(mark(cfg, samples), labels)
        _grid(real, samples, work / f"samples-{scheduler}-{steps}-{guidance}.png")
    (work / "evaluation.json").write_text(json.dumps(table, indent=2) + "\n")
    (work / "prompts.json").write_text(json.dumps([row["exact"] for row in rows], indent=1) + "\n")
    for name, values in table.items():
        print(f"{name:44}", "  ".join(f"{k} {v:5.1f}" for k, v in values.items()), flush=True)
    return True


def _grid(real: torch.Tensor, samples: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Rows of drawings, and below each the sample of the same caption."""
    rows = []
    for start in range(0, 3 * columns, columns):
        for images in (real, samples):
            strip = torch.cat(list(images[start : start + columns].cpu()), dim=2)
            rows.append(((strip.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).byte().numpy())
    Image.fromarray(np.concatenate(rows)).save(path)


STEPS: dict[str, Callable[[DictConfig], bool]] = {
    "data": make_data,
    "tokenizer": make_tokenizer,
    "classifier": train_marker,
    "vae": train_vae,
    "latents": encode_latents,
    "diffusion": train_diffusion,
    "evaluate": evaluate,
}

if __name__ == "__main__":
    main()
