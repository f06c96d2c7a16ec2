"""What serving code asks of diffusers' pipelines: calls by name, and what engines make of each.

A call gets a pipeline and returns something to compare: it is run with diffusers' own networks and
with engines of the same weights.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

PROMPT = "A big banana leaf with lemons in front of it"
Run = Callable[[Any], Any]
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


@dataclass(frozen=True)
class Call:
    """A use of a pipeline.

    Attributes:
        name: as `docs/conformance.md` has it.
        run: what is done with the pipeline.
        refused: what the message of the refusal has; empty: engines give what diffusers gives.
        quick: whether it is a part of `make test`; refusals always are.
        only: the pipelines that have it.
    """

    name: str
    run: Run
    refused: str = ""
    quick: bool = False
    only: tuple[str, ...] = (SD, SDXL)


def paint(pipe: Any, *args: Any, **settings: Any) -> Any:
    """Return the pictures of a prompt, or of what else is given, in a few steps."""
    defaults = {
        "num_inference_steps": 3,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(7),
    }
    if not args and "prompt_embeds" not in settings:
        settings = {"prompt": PROMPT, **settings}
    return pipe(*args, **{**defaults, **settings}).images


def call(name: str, only: tuple[str, ...] = (SD, SDXL), *, quick: bool = False, **s: Any) -> Call:
    """Return a call with these arguments that engines answer as diffusers does."""
    return Call(name, lambda pipe: paint(pipe, **s), quick=quick, only=only)


def refused(name: str, run: Run, message: str, only: tuple[str, ...] = (SD, SDXL)) -> Call:
    """Return a use that engines refuse."""
    return Call(name, run, message, quick=True, only=only)


def no(expression: str, message: str, run: Run, only: tuple[str, ...] = (SD, SDXL)) -> Call:
    """Return a method that engines do not have."""
    method = expression.removesuffix("()").rpartition(".")[2]
    return refused(expression, run, rf"has no {method}\(\): {message}", only)


def _latents() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def _generators(pipe: Any) -> Any:
    return paint(pipe, generator=[torch.Generator().manual_seed(5)])


def _seeded(pipe: Any) -> Any:
    torch.manual_seed(5)
    return paint(pipe, generator=None)


def _embeds(pipe: Any) -> Any:
    device = torch.device("cpu")
    found = pipe.encode_prompt(
        PROMPT, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += [f"{'negative_' * half}pooled_prompt_embeds" for half in (0, 1)][: len(found) - 2]
    return paint(pipe, **dict(zip(names, found, strict=True)))


def _callback(pipe: Any) -> Any:
    def halve(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.9}

    return paint(pipe, callback_on_step_end=halve)


def _interrupted(pipe: Any) -> Any:
    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 1
        return tensors

    first = paint(pipe, callback_on_step_end=stop, num_inference_steps=4)
    return torch.cat([first, paint(pipe)])  # and used again


def _scheduler(name: str, **options: Any) -> Run:
    def run(pipe: Any) -> Any:
        cls = getattr(diffusers, name)
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
        return paint(pipe, num_inference_steps=4)

    return run


def _with_scheduler(name: str, **settings: Any) -> Run:
    def run(pipe: Any) -> Any:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        return paint(pipe, **settings)

    return run


def _auto(pipe: Any) -> Any:
    made = diffusers.AutoPipelineForText2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return paint(made)


def _from_pipe(pipe: Any) -> Any:
    made = type(pipe).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return paint(made)


def _image_to_image(pipe: Any) -> Any:
    made = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return paint(made, image=torch.zeros(1, 3, 128, 128))


def _perturbed(pipe: Any) -> Any:
    made = diffusers.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)
    made.set_progress_bar_config(disable=True)
    return paint(made)


def _ids(pipe: Any) -> torch.Tensor:
    tokens = pipe.tokenizer(
        [PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    ids: torch.Tensor = tokens.input_ids
    return ids


def _encoded(pipe: Any) -> Any:
    found = pipe.text_encoder(_ids(pipe))
    as_tuple = pipe.text_encoder(_ids(pipe), return_dict=False)
    last, pooled = found.last_hidden_state, found.pooler_output
    return torch.cat([value.flatten() for value in (last, pooled, *as_tuple[:2], found[0])])


def _decoded(pipe: Any) -> Any:
    return pipe.vae.decode(_latents(), return_dict=False)[0]


def _sliced(pipe: Any) -> Any:
    pipe.vae.enable_slicing()
    try:
        return pipe.vae.decode(_latents().repeat(2, 1, 1, 1)).sample
    finally:
        pipe.vae.disable_slicing()


def _predicted(pipe: Any) -> Any:
    features = pipe.unet.config.cross_attention_dim
    text = torch.randn(2, 77, features, generator=torch.Generator().manual_seed(4))
    latents = _latents().repeat(2, 1, 1, 1)
    zero_dim = pipe.unet(sample=latents, timestep=torch.tensor(5), encoder_hidden_states=text)
    several = pipe.unet(latents, torch.tensor([5, 5]), text, return_dict=False)
    return torch.cat([zero_dim.sample, *several])


def _read_config(pipe: Any) -> Any:
    config = pipe.unet.config
    return torch.tensor([float(config.in_channels), float(config["sample_size"] > 0)])


def _moved(pipe: Any) -> Any:
    return paint(pipe.to("cpu").to(torch.float32))


# Of diffusers: what is installed besides has them all run, but for two that need torchsde.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)

# The loop is the same for both pipelines; these differ in what they draw and remember.
_OF_BOTH = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler", "TCDScheduler")


def _with_each(name: str) -> Call:
    only = (SD, SDXL) if name in _OF_BOTH else (SD,)
    return Call(name, _scheduler(name), quick=name == "TCDScheduler", only=only)


EQUAL = [
    call("prompt", quick=True),
    call("negative_prompt", negative_prompt="blurry"),
    call("guidance_scale=1", guidance_scale=1.0, quick=True),
    call("guidance_scale=3", guidance_scale=3.0),
    call("num_inference_steps=1", num_inference_steps=1),
    call("height, width", height=128, width=128),
    call("a prompt of nothing", prompt=""),
    call("a prompt of more than 77 tokens", prompt="lemons and " * 60),
    call("a list of prompts", prompt=[PROMPT]),
    call("a prompt in another script", prompt="柠檬 🍋 über"),
    call("latents", latents=_latents()),
    Call("a generator for each picture", _generators),
    Call("torch.manual_seed", _seeded),
    Call("prompt_embeds", _embeds),
    call("output_type='latent'", output_type="latent"),
    call("output_type='np'", output_type="np"),
    call("output_type='pil'", output_type="pil"),
    Call(
        "return_dict=False",
        lambda pipe: pipe(
            PROMPT,
            num_inference_steps=2,
            output_type="pt",
            return_dict=False,
            generator=torch.Generator().manual_seed(7),
        )[0],
    ),
    Call("callback_on_step_end", _callback),
    Call("an interrupt, and another call", _interrupted, quick=True),
    Call("timesteps", _with_scheduler("EulerDiscreteScheduler", timesteps=[900, 500, 100])),
    Call("sigmas", _with_scheduler("EulerDiscreteScheduler", sigmas=[8.0, 3.0, 1.0])),
    Call("eta", _with_scheduler("DDIMScheduler", eta=0.5)),
    call("guidance_rescale", guidance_rescale=0.7),
    call("cross_attention_kwargs={}", cross_attention_kwargs={}, quick=True),
    call("prompt_2", (SDXL,), prompt_2="a lemon"),
    call("original_size, target_size", (SDXL,), original_size=(96, 128), target_size=(128, 128)),
    call("crops_coords_top_left", (SDXL,), crops_coords_top_left=(16, 8)),
    call("denoising_end", (SDXL,), denoising_end=0.6, output_type="latent"),
    *(_with_each(name) for name in SCHEDULERS),
    Call("use_karras_sigmas", _scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)),
    Call(
        "prediction_type='v_prediction'",
        _scheduler("DDIMScheduler", prediction_type="v_prediction"),
    ),
    Call("AutoPipelineForText2Image.from_pipe", _auto, quick=True),
    Call("from_pipe", _from_pipe, quick=True),
    Call("to, what it is already", _moved),
    Call("text_encoder(ids): last_hidden_state, pooler_output", _encoded, quick=True, only=(SD,)),
    Call("vae.decode", _decoded),
    Call("vae.enable_slicing", _sliced, quick=True),
    Call("unet by name, timesteps of 0 and 1 dimensions", _predicted, quick=True, only=(SD,)),
    Call("unet.config", _read_config, quick=True),
]

REFUSED = [
    no("load_lora_weights()", "LoRAs are fused", lambda p: p.load_lora_weights("x")),
    no("unload_lora_weights()", "LoRAs are fused", lambda p: p.unload_lora_weights()),
    no("fuse_lora()", "LoRAs are fused", lambda p: p.fuse_lora()),
    no("set_adapters()", "LoRAs are fused", lambda p: p.set_adapters(["x"])),
    no("load_ip_adapter()", "engines have no inputs", lambda p: p.load_ip_adapter("x", None, "y")),
    refused(
        "ip_adapter_image",
        lambda p: paint(p, ip_adapter_image=torch.zeros(1, 3, 8, 8)),
        "no argument ip_adapter_image: engines have no inputs",
    ),
    refused(
        "ip_adapter_image_embeds",
        lambda p: paint(p, ip_adapter_image_embeds=[torch.zeros(2, 1, 8)]),
        "no argument ip_adapter_image_embeds",
    ),
    no("load_textual_inversion()", "a text encoder's", lambda p: p.load_textual_inversion("x")),
    no(
        "text_encoder.resize_token_embeddings()",
        "a text encoder's engine",
        lambda p: p.text_encoder.resize_token_embeddings(9),
    ),
    refused("clip_skip", lambda p: paint(p, clip_skip=1), "clip_skip"),
    refused(
        "cross_attention_kwargs={'gligen': …}",
        lambda p: paint(p, cross_attention_kwargs={"gligen": 1}),
        "no input for cross_attention_kwargs",
    ),
    no("enable_freeu()", "FreeU", lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    no("fuse_qkv_projections()", "how attention", lambda p: p.fuse_qkv_projections()),
    no("enable_attention_slicing()", "how attention", lambda p: p.enable_attention_slicing()),
    no(
        "enable_xformers_memory_efficient_attention()",
        "how attention",
        lambda p: p.enable_xformers_memory_efficient_attention(),
    ),
    no("enable_model_cpu_offload()", "an engine stays", lambda p: p.enable_model_cpu_offload()),
    no(
        "unet.set_attn_processor()",
        "how attention",
        lambda p: p.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
    ),
    no("vae.encode()", "engines are for text", lambda p: p.vae.encode(torch.zeros(1, 3, 128, 128))),
    no("vae.enable_tiling()", "an engine decodes", lambda p: p.vae.enable_tiling()),
    refused("AutoPipelineForImage2Image.from_pipe", _image_to_image, r"has no encode\(\)"),
    refused(
        "AutoPipelineForText2Image.from_pipe(enable_pag=True)", _perturbed, "no attn_processors"
    ),
    no("save_pretrained()", "engines are no weights", lambda p: p.save_pretrained("unwritten")),
    refused("pickle.dumps", pickle.dumps, "cannot be pickled"),
    refused("pickle.dumps(pipe.unet)", lambda p: pickle.dumps(p.unet), "cannot be pickled"),
    refused("copy.deepcopy", copy.deepcopy, "cannot be pickled or copied"),
    refused("unet.half()", lambda p: p.unet.half(), "cannot change its precision"),
    refused("to(torch.float16)", lambda p: p.to(torch.float16), "cannot change its precision"),
    refused("unet.cuda()", lambda p: p.unet.cuda(), "cannot be moved"),
    refused("to('cuda')", lambda p: p.to("cuda"), "cannot be moved"),
    refused(
        "complex latents",
        lambda p: paint(p, latents=_latents().to(torch.complex64)),
        "latents: an engine takes real numbers",
    ),
    refused(
        "boolean latents",
        lambda p: paint(p, latents=_latents() > 0),
        "latents: an engine takes real numbers",
    ),
    refused(
        "vae.decode of boolean latents",
        lambda p: p.vae.decode(_latents() > 0),
        "takes no torch.bool for latents",
    ),
    refused(
        "text_encoder of floating-point ids",
        lambda p: p.text_encoder(_ids(p).float()),
        "takes no torch.float32 for token ids",
    ),
    refused(
        "another size",
        lambda p: paint(p, height=64, width=64),
        r"export=dynamic(.|\n)*conf/export/dynamic\.yaml",
    ),
    refused(
        "more pictures than rows",
        lambda p: paint(p, guidance_scale=1.0, num_images_per_prompt=3),
        r"batch 3\n.*two rows per image with guidance, and one without",
    ),
    refused(
        "embeddings of 154 tokens",
        lambda p: p.unet(
            _latents().repeat(2, 1, 1, 1),
            5,
            torch.zeros(2, 154, p.unet.config.cross_attention_dim),
            **_added(p),
        ),
        r"tokens 154\n +fix: +engines are built for the 77 tokens",
    ),
    refused(
        "several timesteps at once",
        lambda p: p.unet(
            _latents().repeat(2, 1, 1, 1),
            torch.tensor([5, 6]),
            torch.zeros(2, 77, p.unet.config.cross_attention_dim),
            **_added(p),
        ),
        "one timestep per call",
    ),
]


def _added(pipe: Any) -> dict[str, Any]:
    """The conditions that SDXL's UNet has besides."""
    if "projection_class_embeddings_input_dim" not in pipe.unet.config:
        return {}
    features = pipe.unet.config.projection_class_embeddings_input_dim
    if features is None:
        return {}
    pooled = features - 6 * pipe.unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    return {"added_cond_kwargs": added}
