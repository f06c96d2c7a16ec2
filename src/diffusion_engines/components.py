"""The networks of Stable Diffusion pipelines: what goes in, what comes out, in which shapes.

One :class:`PipelineSpec` per pipeline class of diffusers says which components a model has, and
one :class:`ComponentSpec` per component is the only place that knows its inputs and outputs. The
modules that take these inputs are in ``runtime/networks.py``. A new model costs at most a
``ComponentSpec`` and such a module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion_engines.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from diffusion_engines.config import Dynamic, Image

# CLIP's context length; every text encoder of the Stable Diffusion family has it.
TOKENS = 77
# SDXL's micro-conditioning: original size, crop, target size, each as height and width, in pixels.
# Section 2.2 of https://arxiv.org/abs/2307.01952
SIZES = 6


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
    """One input. ``dtype`` "component" stands for the precision of the export."""

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
class OutputSpec:
    """One output; shapes and dtypes follow from the graph."""

    name: str
    role: str


@dataclass(frozen=True)
class ComponentSpec:
    """A component: its weights, its module, its inputs and outputs.

    Attributes:
        name: as in the config.
        folder: of a diffusers model folder that holds its weights.
        library, class_name: what loads that folder.
        module: the class in ``runtime/networks.py`` that has these inputs and outputs.
        inputs: from the architecture (``config.json``), the image size and the open dimensions.
        outputs: ``output_0`` and so on, in the order in which the module returns them.
    """

    name: str
    folder: str
    library: Literal["diffusers", "transformers"]
    class_name: str
    module: str
    inputs: Callable[[Mapping[str, Any], Image, Dynamic], tuple[TensorSpec, ...]]
    outputs: tuple[OutputSpec, ...]

    @property
    def role(self) -> str:
        """What it is for in any pipeline."""
        return {"unet": "denoiser", "vae_decoder": "decoder"}.get(self.name, "encoder")


@dataclass(frozen=True)
class PipelineSpec:
    """What a pipeline class of diffusers is made of.

    Attributes:
        class_name: as in ``model_index.json``.
        components: by name, in the order in which they run.
        tokenizers: the folder of the tokenizer of each text encoder, by the encoder's name.
    """

    class_name: str
    components: Mapping[str, ComponentSpec]
    tokenizers: Mapping[str, str]

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a diffusers model that this pipeline needs."""
        networks = (spec.folder for spec in self.components.values())
        return (*networks, *self.tokenizers.values(), "scheduler")

    def component(self, name: str) -> ComponentSpec:
        """Return a component.

        Raises:
            ConfigError: the pipeline has no such component.
        """
        if name not in self.components:
            raise ConfigError(
                f"the model has no {name}",
                expected=f"one of {', '.join(self.components)}, as a {self.class_name} has",
                found=name,
                fix="choose another fleet (conf/fleet/) or another model (conf/model/)",
            )
        return self.components[name]


def pipeline_of(folder: Path) -> PipelineSpec:
    """Return the pipeline of a diffusers folder, by the class that its ``model_index.json`` names.

    Raises:
        WeightsError: there is no such file, or it names no class.
        ConfigError: it is of a class that no engines are built for.
    """
    path = folder / "model_index.json"
    try:
        name = json.loads(path.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder} is no diffusers model folder",
            expected="a model_index.json that names the class of the pipeline",
            found=f"{type(error).__name__}: {error}",
            fix="correct model.folder in conf/model/",
        ) from error
    if name not in PIPELINES:
        raise ConfigError(
            f"{folder} is of a model whose pipeline no engines are built for",
            expected=" or ".join(PIPELINES),
            found=str(name),
            fix="choose another model (conf/model/)",
        )
    return PIPELINES[name]


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


def check_unet(architecture: Mapping[str, Any], pipeline: PipelineSpec) -> None:
    """Check that a UNet takes the conditions that the engines of its pipeline have inputs for.

    Raises:
        ConfigError: it takes others.
    """
    expected = {
        # https://arxiv.org/abs/2310.04378: guidance as an embedding beside the timestep
        "time_cond_proj_dim": None,
        "addition_embed_type": "text_time" if pipeline is STABLE_DIFFUSION_XL else None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "in_channels": architecture["out_channels"],
    }
    found = {key: architecture.get(key) for key in expected}
    if wrong := [key for key in expected if found[key] != expected[key]]:
        raise ConfigError(
            f"the UNet takes conditions that engines of a {pipeline.class_name} have no input for",
            expected=", ".join(f"{key} {expected[key]}" for key in wrong),
            found=", ".join(f"{key} {found[key]}" for key in wrong),
            fix="engines are for text to image: inpainting, depth and the like have other UNets;\n"
            "of a distilled latent consistency model (time_cond_proj_dim), take the LoRA of that\n"
            "name with the model that it was made from, and the scheduler lcm",
        )


def _unet_inputs(
    architecture: Mapping[str, Any], image: Image, dynamic: Dynamic
) -> tuple[TensorSpec, ...]:
    # Classifier-free guidance runs the unconditional and the conditional half in one call.
    rows = 2 if image.guidance else 1
    batch = _dim("batch", rows * image.batch_size, dynamic.batch_size, rows, rows)
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


def _sdxl_unet_inputs(
    architecture: Mapping[str, Any], image: Image, dynamic: Dynamic
) -> tuple[TensorSpec, ...]:
    inputs = _unet_inputs(architecture, image, dynamic)
    batch = inputs[0].shape[0]
    sinusoids = SIZES * architecture["addition_time_embed_dim"]
    pooled = architecture["projection_class_embeddings_input_dim"] - sinusoids
    return (
        *inputs,
        TensorSpec("input_3", "pooled embedding", "component", (batch, pooled)),
        # fp32 as the timestep: fp16 skips integers from 2048 on.
        TensorSpec("input_4", "sizes", "float32", (batch, SIZES)),
    )


def _vae_decoder_inputs(
    architecture: Mapping[str, Any], image: Image, dynamic: Dynamic
) -> tuple[TensorSpec, ...]:
    batch = _dim("batch", image.batch_size, dynamic.batch_size, 1, 1)
    height, width = _latent_edges(image, dynamic, 1)
    channels = architecture["latent_channels"]
    return (TensorSpec("input_0", "latents", "component", (batch, channels, height, width)),)


def _text_encoder(
    name: str, module: str, outputs: tuple[OutputSpec, ...], class_name: str = "CLIPTextModel"
) -> ComponentSpec:
    return ComponentSpec(
        name, name, "transformers", class_name, module, _text_encoder_inputs, outputs
    )


def _unet(module: str, inputs: Callable[..., tuple[TensorSpec, ...]]) -> ComponentSpec:
    outputs = (OutputSpec("output_0", "noise"),)
    return ComponentSpec(
        "unet", "unet", "diffusers", "UNet2DConditionModel", module, inputs, outputs
    )


_HIDDEN = OutputSpec("output_0", "hidden state")
_VAE_DECODER = ComponentSpec(
    "vae_decoder",
    "vae",
    "diffusers",
    "AutoencoderKL",
    "VAEDecoder",
    _vae_decoder_inputs,
    (OutputSpec("output_0", "images"),),
)


def _pipeline(
    class_name: str, components: tuple[ComponentSpec, ...], tokenizers: Mapping[str, str]
) -> PipelineSpec:
    return PipelineSpec(class_name, {spec.name: spec for spec in components}, tokenizers)


STABLE_DIFFUSION = _pipeline(
    "StableDiffusionPipeline",
    (
        _text_encoder("text_encoder", "TextEncoder", (_HIDDEN,)),
        _unet("UNet", _unet_inputs),
        _VAE_DECODER,
    ),
    {"text_encoder": "tokenizer"},
)
STABLE_DIFFUSION_XL = _pipeline(
    "StableDiffusionXLPipeline",
    (
        _text_encoder("text_encoder", "PenultimateTextEncoder", (_HIDDEN,)),
        _text_encoder(
            "text_encoder_2",
            "ProjectedTextEncoder",
            (_HIDDEN, OutputSpec("output_1", "pooled embedding")),
            "CLIPTextModelWithProjection",
        ),
        _unet("ConditionedUNet", _sdxl_unet_inputs),
        _VAE_DECODER,
    ),
    {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
)
PIPELINES: Mapping[str, PipelineSpec] = {
    spec.class_name: spec for spec in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
}
