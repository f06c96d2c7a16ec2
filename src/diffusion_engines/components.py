"""The networks of a Stable Diffusion pipeline: what goes in, what comes out, in which shapes.

One :class:`ComponentSpec` per component is the only place that knows this; the modules that take
these inputs are in ``runtime/networks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from diffusion_engines.config import Dynamic, Image

# CLIP's context length; every text encoder of the Stable Diffusion family has it.
TOKENS = 77


@dataclass(frozen=True)
class Dim:
    """An open dimension of an exported graph: ``min <= size <= max``, in steps of ``step``."""

    name: str
    size: int
    min: int
    max: int
    step: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. ``dtype`` "component" stands for the precision of the export."""

    name: str
    role: str
    dtype: Literal["component", "float32", "int64"]
    shape: tuple[int | Dim, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The shape with every open dimension at its usual size."""
        return tuple(dim.size if isinstance(dim, Dim) else dim for dim in self.shape)

    @property
    def dynamic(self) -> bool:
        """Whether any dimension is open."""
        return any(isinstance(dim, Dim) for dim in self.shape)


@dataclass(frozen=True)
class ComponentSpec:
    """A component: its weights, its module, its inputs and outputs.

    Attributes:
        name: as in the config.
        folder: of a diffusers model folder that holds its weights.
        library, class_name: what loads that folder.
        inputs: from the architecture (``config.json``), the image size and the open dimensions.
    """

    name: str
    folder: str
    library: Literal["diffusers", "transformers"]
    class_name: str
    inputs: Callable[[Mapping[str, Any], Image, Dynamic], tuple[TensorSpec, ...]]


def _dim(name: str, size: int, bounds: list[int] | None, scale: float, step: int) -> int | Dim:
    """A fixed size, or an open dimension whose bounds are given before scaling."""
    if bounds is None:
        return size
    low, high = (int(bound * scale) for bound in bounds)
    return Dim(name, size, low, high, step)


def _latent_edges(image: Image, dynamic: Dynamic, step: int) -> tuple[int | Dim, int | Dim]:
    factor = image.vae_scale_factor
    return (
        _dim("height", image.height // factor, dynamic.height, 1 / factor, step),
        _dim("width", image.width // factor, dynamic.width, 1 / factor, step),
    )


def _text_encoder_inputs(
    architecture: Mapping[str, Any], image: Image, dynamic: Dynamic
) -> tuple[TensorSpec, ...]:
    batch = _dim("batch", image.batch_size, dynamic.batch_size, 1, 1)
    return (TensorSpec("input_0", "token ids", "int64", (batch, TOKENS)),)


def _unet_inputs(
    architecture: Mapping[str, Any], image: Image, dynamic: Dynamic
) -> tuple[TensorSpec, ...]:
    # Classifier-free guidance runs the unconditional and the conditional half in one call.
    batch = _dim("batch", 2 * image.batch_size, dynamic.batch_size, 2, 2)
    # Each down-sampling halves an edge; a rest would make up- and down-path disagree.
    step = 2 ** (len(architecture["block_out_channels"]) - 1)
    height, width = _latent_edges(image, dynamic, step)
    channels, context = architecture["in_channels"], architecture["cross_attention_dim"]
    return (
        TensorSpec("input_0", "latents", "component", (batch, channels, height, width)),
        # fp32 in every precision: schedulers such as LMS have fractional timesteps, and fp16
        # holds no fraction near 1000. The network computes its sinusoids in fp32 anyway.
        TensorSpec("input_1", "timestep", "float32", (1,)),
        TensorSpec("input_2", "text embeddings", "component", (batch, TOKENS, context)),
    )


def _vae_decoder_inputs(
    architecture: Mapping[str, Any], image: Image, dynamic: Dynamic
) -> tuple[TensorSpec, ...]:
    batch = _dim("batch", image.batch_size, dynamic.batch_size, 1, 1)
    height, width = _latent_edges(image, dynamic, 1)
    channels = architecture["latent_channels"]
    return (TensorSpec("input_0", "latents", "component", (batch, channels, height, width)),)


COMPONENTS: dict[str, ComponentSpec] = {
    spec.name: spec
    for spec in (
        ComponentSpec(
            "text_encoder",
            "text_encoder",
            "transformers",
            "CLIPTextModel",
            _text_encoder_inputs,
        ),
        ComponentSpec(
            "unet",
            "unet",
            "diffusers",
            "UNet2DConditionModel",
            _unet_inputs,
        ),
        ComponentSpec(
            "vae_decoder",
            "vae",
            "diffusers",
            "AutoencoderKL",
            _vae_decoder_inputs,
        ),
    )
}
