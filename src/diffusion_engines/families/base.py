"""What a family declares: its components by role, and how a prompt becomes a picture.

Code outside of ``families/`` asks a :class:`Family` by role and knows no component by name.
Imports neither torch nor diffusers: DVC reads families whenever it composes ``conf/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
class Only:
    """A key of a config that is taken with some values and refused with any other.

    Attributes:
        values: that are taken, as JSON has them.
        why: no other is, for a message: the rest of a sentence.
    """

    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Keys:
    """What becomes of every key of a config; no key has two places.

    A key that is in none of them is one that the library's class does not know: it is ignored
    here, as the library does. The tests compare the rest with the parameters of the class.

    Attributes:
        honoured: what is computed follows any value: the class does, or the family.
        only: refused but for some values.
        idle: nothing that engines compute depends on them.
    """

    honoured: frozenset[str]
    only: Mapping[str, Only]
    idle: frozenset[str]


# Of the networks of a model by component, with the defaults of their classes.
Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Fit:
    """Two values that a model's networks have to agree on, and what each is, for a message."""

    one: str
    value: Callable[[Configs], Any]
    other: str
    expected: Callable[[Configs], Any]


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
        keys: of its config; None: whatever its class takes.
        derived: the keys that its class adds to its config, from the rest of it.
        variants: what may take its place: the same component as another class.
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
    keys: Keys | None = None
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    variants: tuple[Component, ...] = ()

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
        tokenizer_files: by the classes that a tokenizer may be of, the files that it needs: one of
            several sets.
        tokens: how long the encoders' inputs are.
        encode: ``encode(networks, model, prompts, negative_prompt, size, device)`` returns what
            the denoiser is conditioned on, a row per image. Where the negative prompt is not None,
            the unconditional rows come first, and as many conditional ones after them. ``size`` is
            the height and width of the images in pixels; ``device`` where networks expect inputs.
        denoise: ``denoise(networks, rows, timestep, conditions)`` returns the denoiser's prediction
            for latents (rows, channels, h, w) at a timestep of the scheduler, a 0-d tensor.
        decode: ``decode(networks, model, latents)`` returns images (batch, 3, height, width), fp32
            in [0, 1], of latents; NaN stays NaN, so that what overflows is seen.
        fits: what the networks of a model have to agree on.
        latent_channels: of the latents, from the configs.
        pixels_per_latent: along an edge, from the configs.
        schedulers: by their names in ``conf/``.
        options: of the diffusers pipeline besides its modules, from ``model_index.json``.
        keys: of ``model_index.json`` besides components, tokenizers and scheduler; None: any.
        lora: None: there are none that can be read.
        skips: the folders of the text encoders whose last layers can be left out (``clip_skip``),
            as nothing but the state after them is used.
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
    latent_channels: Callable[[Configs], int]
    pixels_per_latent: Callable[[Configs], int]
    schedulers: Mapping[str, Scheduler]
    options: Callable[[Mapping[str, Any]], dict[str, Any]]
    tokenizer_files: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    tokens: int = 0
    fits: tuple[Fit, ...] = ()
    keys: Keys | None = None
    lora: LoraFormat | None = None
    skips: tuple[str, ...] = ()
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
        weights = (pattern for component in components for pattern in component.weight_patterns)
        return (*self.wanted_first, *weights)

    @property
    def wanted_first(self) -> tuple[str, ...]:
        """Patterns of the small ones among these files, which say what the others have to be."""
        return (
            "model_index.json",
            SCHEDULER_CONFIG,
            *(f"{folder}/*" for folder in self.tokenizers.values()),
            *(f"{component.folder}/config.json" for component in self.components.values()),
        )

    def as_in(self, index: Mapping[str, Any]) -> Family:
        """Return the family with the variants of components that a ``model_index.json`` names."""
        chosen = {
            name: next(
                (
                    variant
                    for variant in component.variants
                    if index.get(component.folder) == [variant.library, variant.class_name]
                ),
                component,
            )
            for name, component in self.components.items()
        }
        return self if chosen == self.components else replace(self, components=chosen)

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
