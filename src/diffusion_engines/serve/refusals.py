"""What diffusers' pipelines and networks can do and engines cannot, and what to do in its place.

Else most of these calls would end in an AttributeError of a network that is not there, and some
would do nothing without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusion_engines.errors import ConfigError

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Refusal:
    """Why an engine cannot do something, and what to do instead."""

    reason: str
    fix: str


_LORA = Refusal(
    "LoRAs are fused into the weights before an engine is built",
    "build engines with it: `make repro ARGS=\"'model.loras=[{file: mine.safetensors, weight: "
    "0.8}]'\"`\n(docs/loras.md), and load their folder",
)
_ADAPTER = Refusal(
    "engines have no inputs for an IP-Adapter", "call the pipeline with prompts alone"
)
_TOKENS = Refusal(
    "a text encoder's engine has the vocabulary that it was built with",
    "build the text encoder's engine with the word: `make repro ARGS=\"'model.embeddings=[{file: "
    "mine.safetensors, word: mystyle}]'\"`\n(docs/loras.md), and load its folder",
)
_ATTENTION = Refusal(
    "how attention is computed was settled when the engine was built",
    "leave the call out; an engine has the fastest attention that its backend found",
)
_FREEU = Refusal("FreeU changes what is inside of the UNet", "leave the call out")
_OFFLOAD = Refusal(
    "an engine stays on the device that it was built for",
    "leave the call out; for less memory, build engines in a lower precision (docs/precisions.md)",
)
_SAVING = Refusal(
    "engines are no weights that diffusers could write and load again",
    "copy the target's folder as it is: it is all that `load_pipeline` reads",
)
_ENCODER = Refusal(
    "engines are for text to image, which needs the decoding half of the VAE alone",
    "encode pictures with the checkpoint's AutoencoderKL of diffusers",
)
_TILING = Refusal(
    "an engine decodes the sizes that it was built for, and no parts of them",
    "build a VAE decoder for the size of the pictures (image.height, image.width or "
    "export=dynamic);\n`vae.enable_slicing()` decodes one picture after the other",
)

# Methods of diffusers' pipelines.
OF_PIPELINES: Mapping[str, Refusal] = {
    "load_lora_weights": _LORA,
    "load_lora_into_unet": _LORA,
    "load_lora_into_text_encoder": _LORA,
    "unload_lora_weights": _LORA,
    "fuse_lora": _LORA,
    "unfuse_lora": _LORA,
    "set_adapters": _LORA,
    "enable_lora": _LORA,
    "disable_lora": _LORA,
    "delete_adapters": _LORA,
    "enable_lora_hotswap": _LORA,
    "load_ip_adapter": _ADAPTER,
    "set_ip_adapter_scale": _ADAPTER,
    "load_textual_inversion": _TOKENS,
    "enable_attention_slicing": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "fuse_qkv_projections": _ATTENTION,
    "unfuse_qkv_projections": _ATTENTION,
    "enable_freeu": _FREEU,
    "enable_model_cpu_offload": _OFFLOAD,
    "enable_sequential_cpu_offload": _OFFLOAD,
    "enable_group_offload": _OFFLOAD,
    "enable_vae_tiling": _TILING,
    "save_pretrained": _SAVING,
    "push_to_hub": _SAVING,
    "save_lora_weights": _SAVING,
}
# Methods of diffusers' and transformers' networks.
OF_UNETS: Mapping[str, Refusal] = {
    "set_attn_processor": _ATTENTION,
    "set_default_attn_processor": _ATTENTION,
    "set_attention_slice": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "fuse_qkv_projections": _ATTENTION,
    "unfuse_qkv_projections": _ATTENTION,
    "enable_freeu": _FREEU,
    "load_lora_adapter": _LORA,
    "add_adapter": _LORA,
    "load_attn_procs": _LORA,
    "save_pretrained": _SAVING,
}
OF_DECODERS: Mapping[str, Refusal] = {
    "encode": _ENCODER,
    "enable_tiling": _TILING,
    "set_attn_processor": _ATTENTION,
    "fuse_qkv_projections": _ATTENTION,
    "save_pretrained": _SAVING,
}
OF_TEXT_ENCODERS: Mapping[str, Refusal] = {
    "get_input_embeddings": _TOKENS,
    "resize_token_embeddings": _TOKENS,
    "load_adapter": _LORA,
    "add_adapter": _LORA,
    "save_pretrained": _SAVING,
}
# Arguments of diffusers' pipelines.
OF_CALLS: Mapping[str, Refusal] = {
    "ip_adapter_image": _ADAPTER,
    "ip_adapter_image_embeds": _ADAPTER,
}


def error(what: str, refusal: Refusal) -> ConfigError:
    """Return the exception for something that engines cannot do."""
    return ConfigError(f"a pipeline of engines has no {what}: {refusal.reason}", fix=refusal.fix)


def refusing(refusals: Mapping[str, Refusal]) -> Callable[[C], C]:
    """Return a class decorator: what is refused becomes methods that raise ConfigError."""

    def add(cls: C) -> C:
        for name, method in methods(refusals, refusals).items():
            setattr(cls, name, method)
        return cls

    return add


def methods(refusals: Mapping[str, Refusal], names: Collection[str]) -> dict[str, Any]:
    """Return those of ``refusals`` that are among ``names``, as methods that raise ConfigError."""
    return {name: _method(name, refusals[name]) for name in refusals if name in names}


def _method(name: str, refusal: Refusal) -> Callable[..., Any]:
    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error(f"{name}()", refusal)

    refused.__name__ = refused.__qualname__ = name
    return refused
