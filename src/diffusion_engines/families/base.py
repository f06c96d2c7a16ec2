"""What a family declares: its components by role, and how a prompt becomes a picture.

Code outside of ``families/`` asks a :class:`Family` by role and knows no component by name.
Imports neither torch nor diffusers: DVC reads families whenever it composes ``conf/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffusion_engines.errors import ConfigError

if TYPE_CHECKING:
    from diffusion_engines.config import Dynamic, Image

Role = Literal["encoder", "denoiser", "decoder", "control"]
# "component" stands for the precision of the export; of a graph whose precision was lowered, it is
# replaced by the one that its inputs keep.
Dtype = Literal["component", "float32", "float16", "int64"]
# One component at work: tensors in, those of its inputs; out a tensor, or a tuple of several.
Network = Callable[..., Any]
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Dim:
    """An open dimension of an exported graph: ``min <= size <= max``, in steps of ``step``."""

    name: str
    size: int
    min: int
    max: int
    step: int = 1


Shape = tuple[int | Dim, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One input of a graph: ``input_0`` and so on."""

    name: str
    role: str
    dtype: Dtype
    shape: Shape

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
    """One output: ``output_0`` and so on; shapes and dtypes follow from the graph."""

    name: str
    role: str


@dataclass(frozen=True)
class Input:
    """What a component takes at one place: what it holds, and in which dtype."""

    role: str
    dtype: Dtype = "component"


@dataclass(frozen=True)
class Component:
    """A component: its weights, how it is called, its inputs and outputs.

    Attributes:
        name: as in the config; it means the same role in every family.
        role: what it is for.
        folder: of a diffusers model folder that holds its weights.
        library, class_name: what loads that folder.
        takes: its inputs, in order.
        gives: what each of its outputs holds, in order.
        shapes: of the inputs, from the network's config (with its class's defaults), the image
            size and the open dimensions.
        call: ``call(network, *inputs)`` returns the output of the loaded network, or a tuple of
            several.
        adapter: ``module:class`` of what stands for the network in a diffusers pipeline.
        prepare: drops of the loaded network what is not called, so that no export carries it.
    """

    name: str
    role: Role
    folder: str
    library: Literal["diffusers", "transformers"]
    class_name: str
    takes: tuple[Input, ...]
    gives: tuple[str, ...]
    shapes: Callable[[Mapping[str, Any], Image, Dynamic], tuple[Shape, ...]]
    call: Callable[..., Any]
    adapter: str
    prepare: Callable[[Any], None] | None = None

    def inputs(
        self, config: Mapping[str, Any], image: Image, dynamic: Dynamic
    ) -> tuple[TensorSpec, ...]:
        """Return the inputs of its graph, from the network's config, with its class's defaults."""
        shapes = self.shapes(config, image, dynamic)
        return tuple(
            TensorSpec(f"input_{index}", value.role, value.dtype, shape)
            for index, (value, shape) in enumerate(zip(self.takes, shapes, strict=True))
        )

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The outputs of its graph."""
        return tuple(OutputSpec(f"output_{i}", role) for i, role in enumerate(self.gives))

    @property
    def weight_patterns(self) -> tuple[str, str]:
        """Of the safetensors that hold its weights, whole or in shards, and not of variants."""
        stem = "model" if self.library == "transformers" else "diffusion_pytorch_model"
        return (
            f"{self.folder}/{stem}.safetensors*",
            f"{self.folder}/{stem}-*-of-*.safetensors",
        )


def _trained_steps(config: Mapping[str, Any]) -> range:
    """Fewer steps than a model was trained on: of as many, an offset of one would be past them."""
    return range(1, config.get("num_train_timesteps", 1000))


@dataclass(frozen=True)
class Scheduler:
    """A noise schedule's solver: diffusers' class, and what it is asked for beyond the model's.

    Attributes:
        class_name: of diffusers.
        options: of it.
        adds_noise: whether it adds noise at every step.
        steps: how many steps it may be asked for, from a model's ``scheduler_config.json``.
    """

    class_name: str
    options: Mapping[str, Any]
    adds_noise: bool = False
    steps: Callable[[Mapping[str, Any]], range] = _trained_steps

    def problem(self, steps: int, config: Mapping[str, Any]) -> str:
        """Say why it cannot be asked for so many steps; empty where it can."""
        if steps in (known := self.steps(config)):
            return ""
        return f"{self.class_name} takes {known.start} to {known.stop - 1} with this model"


@dataclass(frozen=True)
class LoraFormat:
    """How LoRAs for a family name their layers.

    Attributes:
        networks: the folders of a diffusers model that they change.
        names: of a file's tensors and the denoiser's config, returns the tensors by the names that
            diffusers gives them, and the alphas where the file has them.

    Raises:
        ValueError, KeyError, IndexError: of ``names``, at tensors that diffusers does not know.
    """

    networks: tuple[str, ...]
    names: Callable[
        [Mapping[str, Any], Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any] | None]
    ]


@dataclass(frozen=True)
class Model:
    """A model of a family besides its weights, read from its diffusers folder.

    Attributes:
        family: that it is of.
        index: its ``model_index.json``.
        configs: of the networks by component, with the defaults of their classes.
        tokenizers: by the component that takes the tokens, in the order in which they run.
        scheduler_config: the noise schedule that it was trained with.
    """

    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    tokenizers: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]


Networks = Mapping[str, Network]
# Tensors; torch is not imported here.
Conditions = tuple[Any, ...]


@dataclass(frozen=True)
class Family:
    """A kind of pipeline, as diffusers has it.

    Attributes:
        class_name: as in ``model_index.json``.
        components: by name, in the order in which they run.
        tokenizers: the folder of the tokenizer of each encoder that has one, by the encoder's name.
        encode: ``encode(networks, model, prompts, negative_prompt, size, device)`` returns what
            the denoiser is conditioned on, a row per image. Where the negative prompt is not None,
            the unconditional rows come first, and as many conditional ones after them. ``size`` is
            the height and width of the images in pixels; ``device`` where networks expect inputs.
        denoise: ``denoise(networks, rows, timestep, conditions)`` returns the denoiser's prediction
            for latents (rows, channels, h, w) at a timestep of the scheduler, a 0-d tensor.
        decode: ``decode(networks, model, latents)`` returns images (batch, 3, height, width), fp32
            in [0, 1], of latents; NaN stays NaN, so that what overflows is seen.
        check: ``check(configs)`` raises ConfigError where a model's networks take what the family's
            engines have no input for; ``configs`` as of :class:`Model`.
        latent_channels: of the latents, from the configs.
        pixels_per_latent: along an edge, from the configs.
        schedulers: by their names in ``conf/``.
        options: of the diffusers pipeline besides its modules, from ``model_index.json``.
        lora: None: there are none that can be read.
        around_loop: the arguments of the diffusers pipeline's call that are all used before or
            after the denoising loop, or that the loop of
            :mod:`~diffusion_engines.serve.pipelines` knows. Any other is left to diffusers.
    """

    class_name: str
    components: Mapping[str, Component]
    tokenizers: Mapping[str, str]
    encode: Callable[[Networks, Model, Sequence[str], str | None, tuple[int, int], str], Conditions]
    denoise: Callable[[Networks, Any, Any, Conditions], Any]
    decode: Callable[[Networks, Model, Any], Any]
    check: Callable[[Mapping[str, Mapping[str, Any]]], None]
    latent_channels: Callable[[Mapping[str, Mapping[str, Any]]], int]
    pixels_per_latent: Callable[[Mapping[str, Mapping[str, Any]]], int]
    schedulers: Mapping[str, Scheduler]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    lora: LoraFormat | None = None
    around_loop: frozenset[str] = frozenset()

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a diffusers model that this family needs."""
        networks = (component.folder for component in self.components.values())
        return (*networks, *self.tokenizers.values(), "scheduler")

    @property
    def wanted(self) -> tuple[str, ...]:
        """Patterns of the files that this family needs of a diffusers folder.

        Safetensors only: the pickles beside them can run code when they are loaded. Variants such
        as ``*.fp16.safetensors`` are left out.
        """
        components = self.components.values()
        return (
            "model_index.json",
            SCHEDULER_CONFIG,
            *(f"{folder}/*" for folder in self.tokenizers.values()),
            *(f"{component.folder}/config.json" for component in components),
            *(pattern for component in components for pattern in component.weight_patterns),
        )

    def with_role(self, role: Role) -> tuple[Component, ...]:
        """Return the components of a role, in the order in which they run."""
        return tuple(value for value in self.components.values() if value.role == role)

    @property
    def denoiser(self) -> Component:
        """The one component that runs at every step."""
        (component,) = self.with_role("denoiser")
        return component

    @property
    def decoder(self) -> Component:
        """The one component that makes images of latents."""
        (component,) = self.with_role("decoder")
        return component

    def component(self, name: str) -> Component:
        """Return a component.

        Raises:
            ConfigError: the family has no such component.
        """
        if name not in self.components:
            raise ConfigError(
                f"the model has no {name}",
                expected=f"one of {', '.join(self.components)}, as a {self.class_name} has",
                found=name,
                fix="choose another fleet (conf/fleet/) or another model (conf/model/)",
            )
        return self.components[name]


def by_name(*components: Component) -> Mapping[str, Component]:
    """Return components as a family has them."""
    return {component.name: component for component in components}


def outputs_of(result: Any) -> tuple[Any, ...]:
    """Return the outputs of a network as a tuple, also where there is only one."""
    return result if isinstance(result, tuple) else (result,)
