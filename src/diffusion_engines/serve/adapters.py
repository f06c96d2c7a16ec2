"""Engines in the shape of the networks that a diffusers pipeline calls.

A pipeline asks a network for its ``config``, ``dtype`` and ``device``, calls it with keywords, and
takes the result as a tuple or by name. Every tensor that leaves is fp32, as ``dtype`` says,
whatever the engine computes in: latents lose nothing between the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import configuration_utils
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffusion_engines.errors import ConfigError
from diffusion_engines.families.base import outputs_of
from diffusion_engines.runtime.shapes import CheckedEngine, immovable
from diffusion_engines.serve.refusals import (
    OF_DECODERS,
    OF_TEXT_ENCODERS,
    OF_UNETS,
    error,
    refusing,
)

FrozenDict: Any = configuration_utils.FrozenDict  # untyped in diffusers


@immovable
class EngineModule(torch.nn.Module):
    """What a pipeline asks of any of its networks; an engine stays where and as it was built."""

    dtype = torch.float32

    def __init__(self, engine: CheckedEngine, config: Any) -> None:
        super().__init__()
        self.engine = engine
        self.config = config
        self.device = engine.device

    @property
    def capturable(self) -> bool:
        """Whether its calls can be part of a CUDA graph, as of the engine."""
        return self.engine.capturable

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing where an engine already is what is asked for.

        Raises:
            HardwareError: another device or precision is asked for; both are fixed by the build.
        """
        self.engine.to(*args, **kwargs)
        return self


@refusing(OF_TEXT_ENCODERS)
class TextEncoder(EngineModule):
    """A CLIP text encoder: token ids (batch, 77) to the last hidden state (batch, 77, hidden).

    The pooled output (batch, hidden) is that state where the text ends.
    """

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
        pooled = hidden[torch.arange(len(hidden)), self._ends(input_ids).to(hidden.device)]
        if not return_dict:
            return hidden, pooled
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def _ends(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return where each text ends, as transformers' CLIPTextModel looks for it."""
        end = self.config.eos_token_id
        # Configs of before https://github.com/huggingface/transformers/pull/24773 have a wrong 2;
        # the end is the last of the vocabulary.
        found = input_ids if end == 2 else (input_ids == end).int()
        return found.argmax(dim=-1)


class _PenultimateAlone(tuple[torch.Tensor]):
    """The hidden states of a text encoder whose engine returns the penultimate one alone."""

    def __getitem__(self, index: Any) -> Any:
        if index != -2:
            raise ConfigError(
                "the text encoder's engine returns the penultimate hidden state alone",
                expected="hidden_states[-2]",
                found=f"hidden_states[{index}]",
                fix="call the pipeline without clip_skip",
            )
        return super().__getitem__(0)


class _NoLastHiddenState(torch.Tensor):
    """What stands for the last hidden state where an engine does not give it.

    StableDiffusionXLPipeline asks for its number of dimensions, by which it knows it from a pooled
    embedding, and for nothing else; whatever else would use it is refused.
    """

    ndim = 3

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise ConfigError(
            "the text encoder's engine returns the penultimate hidden state alone",
            expected="hidden_states[-2]",
            found="[0], the last one",
            fix="take hidden_states[-2], which is what the UNet is given; for the last one,\n"
            "load the text encoder in PyTorch",
        )


@dataclass(frozen=True)
class EncodedText:
    """What StableDiffusionXLPipeline reads of a text encoder: ``[0]`` and ``hidden_states[-2]``."""

    first: torch.Tensor
    hidden_states: _PenultimateAlone

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.first,)[index]


@refusing(OF_TEXT_ENCODERS)
class PenultimateTextEncoder(EngineModule):
    """A text encoder of SDXL: token ids (batch, 77) to the penultimate hidden state.

    The second one also gives the pooled embedding, which the pipeline looks for at ``[0]``. There
    the first one has its last hidden state, which no engine gives: it is refused.
    """

    def __init__(self, engine: CheckedEngine, config: Mapping[str, Any]) -> None:
        super().__init__(engine, CLIPTextConfig.from_dict(dict(config)))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = True,
        **unused: Any,
    ) -> EncodedText:
        """Run the engine.

        Raises:
            ConfigError: a mask or another hidden state (``clip_skip``) is asked for.
            ShapeError: the batch is not one that the engine was built for.
        """
        _refuse(self.engine, attention_mask=attention_mask, **unused)
        hidden, *pooled = (value.float() for value in outputs_of(self.engine(input_ids)))
        first = pooled[0] if pooled else torch.empty(0).as_subclass(_NoLastHiddenState)
        return EncodedText(first, _PenultimateAlone((hidden,)))


@refusing(OF_UNETS)
class UNet(EngineModule):
    """A denoiser: latents (batch, 4, h, w), timestep, text (batch, 77, c) to noise like latents.

    SDXL's also takes a pooled embedding (batch, p) and sizes (batch, 6).
    """

    def __init__(self, engine: CheckedEngine, config: Mapping[str, Any]) -> None:
        latents = engine.inputs[0]
        # Height and width of the latents that the engine was built around.
        self.usual = latents.axis("height").usual, latents.axis("width").usual
        self.sized = len(engine.inputs) > 3
        # A number, as of every checkpoint: some of diffusers' pipelines compare it with others.
        # They also mend configs of before 0.9, whose size is not this one.
        known = {key: value for key, value in config.items() if key != "_diffusers_version"}
        super().__init__(engine, FrozenDict({**known, "sample_size": self.usual[0]}))
        if self.sized:
            # Where SDXL's pipeline looks up how long the conditions are.
            features = config["projection_class_embeddings_input_dim"]
            linear = SimpleNamespace(in_features=features)
            self.add_embedding = SimpleNamespace(linear_1=linear)

    @property
    def attn_processors(self) -> Any:
        """Refuse, as pipelines of perturbed attention (PAG) look for them.

        Raises:
            ConfigError: always.
        """
        raise error("attn_processors", OF_UNETS["set_attn_processor"])

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Run the engine.

        Raises:
            ConfigError: a condition is given that the engine has no input for.
            ShapeError: the size or batch is not one that the engine was built for.
        """
        noise = self.noise(
            sample,
            timestep,
            self.conditions(encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **unused),
        )
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def conditions(
        self,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Return what the engine takes besides latents and timestep.

        Raises:
            ConfigError: a condition is given that the engine has no input for.
        """
        conditions = [encoder_hidden_states]
        if self.sized:
            added = dict(added_cond_kwargs or {})
            conditions += [added.pop("text_embeds"), added.pop("time_ids")]
            unused |= added
        else:
            unused["added_cond_kwargs"] = added_cond_kwargs
        _refuse(self.engine, **unused)
        return tuple(conditions)

    def noise(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        conditions: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Return the engine's prediction, like the latents, fp32.

        Raises:
            ConfigError: there are several timesteps.
            ShapeError: the size or batch is not one that the engine was built for.
        """
        step = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if len(step) > 1 and not bool((step == step[0]).all()):
            raise ConfigError(
                f"the engine {self.engine.name} takes one timestep per call", found=str(step)
            )
        rows, allowed = len(sample), self.engine.inputs[0].axis("batch")
        # Most engines are built for the two halves of classifier-free guidance. Without guidance a
        # pipeline sends one half; it runs twice, which an engine of a fixed batch does anyway.
        repeats = 2 if rows not in allowed and 2 * rows in allowed else 1
        latents, *rest = (torch.cat([value] * repeats) for value in (sample, *conditions))
        noise: torch.Tensor = self.engine(latents, step[:1], *rest)
        return noise[:rows].float()


@refusing(OF_DECODERS)
class VAEDecoder(EngineModule):
    """The decoding half of a VAE: latents (batch, 4, h, w) to images (batch, 3, H, W)."""

    def __init__(self, engine: CheckedEngine, config: Mapping[str, Any]) -> None:
        super().__init__(engine, FrozenDict(config))

        self.use_slicing = False

    def enable_slicing(self) -> None:
        """Decode as few latents at once as the engine takes, for less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Decode all latents at once."""
        self.use_slicing = False

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Run the engine; ``generator`` is part of diffusers' signature, and unused there too.

        Raises:
            ShapeError: the size or batch is not one that the engine was built for.
        """
        rows = self.engine.inputs[0].axis("batch").low if self.use_slicing else len(z)
        parts = [z[start : start + rows] for start in range(0, len(z), max(rows, 1))] or [z]
        images = torch.cat([self.engine(part).float() for part in parts])
        return DecoderOutput(sample=images) if return_dict else (images,)

    forward = decode


def _refuse(engine: CheckedEngine, **conditions: Any) -> None:
    given = [name for name, value in conditions.items() if not _asks_for_nothing(value)]
    if given:
        raise ConfigError(
            f"the engine {engine.name} has no input for {', '.join(given)}",
            expected=", ".join(value.role for value in engine.inputs),
            found=", ".join(given),
            fix="call the pipeline without it (clip_skip, IP adapters, attention processors); a\n"
            "text encoder without its last layers is built so: model.clip_skip=1 (docs/models.md)",
        )


def _asks_for_nothing(value: Any) -> bool:
    """Whether a condition is none, or an empty mapping as of ``cross_attention_kwargs``."""
    return value is None or (isinstance(value, Mapping) and not value)
