"""Engines in the shape of the networks that a diffusers pipeline calls.

A pipeline asks a network for its ``config``, ``dtype`` and ``device``, calls it with keywords, and
takes the result as a tuple or by name. Every tensor that leaves is fp32, as ``dtype`` says,
whatever the engine computes in: latents lose nothing between the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import configuration_utils
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.runtime.bundle import engine_device, is_device
from diffusion_engines.runtime.shapes import CheckedEngine

FrozenDict: Any = configuration_utils.FrozenDict  # untyped in diffusers


class EngineModule(torch.nn.Module):
    """What a pipeline asks of any of its networks; an engine stays where and as it was built."""

    dtype = torch.float32

    def __init__(self, engine: CheckedEngine, config: Any) -> None:
        super().__init__()
        self.engine = engine
        self.config = config
        self.device = torch.device(engine_device(dict(engine.manifest)))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing where an engine already is what is asked for.

        Raises:
            HardwareError: another device or precision is asked for; both are fixed by the build.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and not is_device(device, self.device.type):
            raise HardwareError(
                f"the engine {self.engine.name} cannot be moved",
                expected=str(self.device),
                found=f".to({str(device)!r})",
                fix=f"load the engines of a target for {device.type}; to choose among several\n"
                "GPUs, set CUDA_VISIBLE_DEVICES",
            )
        precision = self.engine.manifest["precision"]
        if dtype is not None and dtype not in (torch.float32, _DTYPES[precision]):
            raise HardwareError(
                f"the engine {self.engine.name} cannot change its precision",
                expected=precision,
                found=f".to({dtype})",
                fix="leave the dtype out; the precision is chosen in conf/fleet/",
            )
        return self


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TextEncoder(EngineModule):
    """A CLIP text encoder: token ids (batch, 77) to the last hidden state (batch, 77, hidden)."""

    def __init__(self, engine: CheckedEngine, config: Mapping[str, Any]) -> None:
        super().__init__(engine, CLIPTextConfig.from_dict(dict(config)))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Run the engine.

        Raises:
            ConfigError: hidden states (``clip_skip``) or a mask are asked for, which no engine has.
            ShapeError: the batch is not one that the engine was built for.
        """
        _refuse(
            self.engine,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states or None,  # what clip_skip asks for
            **unused,
        )
        hidden = self.engine(input_ids).float()
        return BaseModelOutputWithPooling(last_hidden_state=hidden) if return_dict else (hidden,)


class UNet(EngineModule):
    """A denoiser: latents (batch, 4, h, w), timestep, text (batch, 77, c) to noise like latents."""

    def __init__(self, engine: CheckedEngine, config: Mapping[str, Any]) -> None:
        latents = engine.inputs[0]
        # The default size of a pipeline is that of its UNet.
        size = [latents.axis("height").usual, latents.axis("width").usual]
        super().__init__(engine, FrozenDict({**config, "sample_size": size}))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Run the engine.

        Raises:
            ConfigError: a condition is given that the engine has no input for.
            ShapeError: the size or batch is not one that the engine was built for.
        """
        _refuse(self.engine, **unused)
        step = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if len(step) > 1 and not bool((step == step[0]).all()):
            raise ConfigError(
                f"the engine {self.engine.name} takes one timestep per call", found=str(step)
            )
        rows, allowed = len(sample), self.engine.inputs[0].axis("batch")
        # An engine is built for the two halves of classifier-free guidance. Without guidance a
        # pipeline sends one half; it runs twice, which an engine of a fixed batch does anyway.
        repeats = 2 if rows not in allowed and 2 * rows in allowed else 1
        noise = self.engine(
            sample.repeat(repeats, 1, 1, 1), step[:1], encoder_hidden_states.repeat(repeats, 1, 1)
        )
        noise = noise[:rows].float()
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)


class VAEDecoder(EngineModule):
    """The decoding half of a VAE: latents (batch, 4, h, w) to images (batch, 3, H, W)."""

    def __init__(self, engine: CheckedEngine, config: Mapping[str, Any]) -> None:
        super().__init__(engine, FrozenDict(config))

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Run the engine; ``generator`` is part of diffusers' signature, and unused there too.

        Raises:
            ShapeError: the size or batch is not one that the engine was built for.
        """
        images = self.engine(z).float()
        return DecoderOutput(sample=images) if return_dict else (images,)

    forward = decode


def _refuse(engine: CheckedEngine, **conditions: Any) -> None:
    given = [name for name, value in conditions.items() if value is not None]
    if given:
        raise ConfigError(
            f"the engine {engine.name} has no input for {', '.join(given)}",
            expected=", ".join(value.role for value in engine.inputs),
            found=", ".join(given),
            fix="call the pipeline without it (clip_skip, IP adapters, attention processors)",
        )
