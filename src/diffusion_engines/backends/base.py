"""What a backend is: one package of this folder, or of somebody else, with the same functions.

A package declares ``BACKEND``, an object of the Protocol :class:`Backend`. Importing it imports
neither PyTorch nor the backend's library, so that ``conf/`` is composed and checked without them;
what needs them is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from pydantic import ConfigDict

from diffusion_engines.families.base import TensorSpec
from diffusion_engines.manifests import Engine

if TYPE_CHECKING:
    from torch import nn

# Of every dataclass of settings: an unknown key or another type is a mistake.
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class Target(Protocol):
    """What engines are built for: a dataclass of its backend's settings (``conf/target/``)."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def backend(self) -> str:
        """The name of the backend, which tells the schemas of targets apart."""


# The main file of a graph, by its format.
GRAPH_FILES = {"onnx": "model.onnx", "exported_program": "program.json"}


@dataclass(frozen=True)
class Graph:
    """What a build reads: one component in one precision.

    Attributes:
        name: such as ``unet-fp16``.
        component: such as ``unet``.
        precision: that most of its layers must have.
        format: ``onnx``, or ``exported_program`` for PyTorch's compilers.
        path: the main file; what else belongs to the graph lies beside it.
        inputs: in the order in which the component takes them.
    """

    name: str
    component: str
    precision: str
    format: str
    path: Path
    inputs: Sequence[TensorSpec]

    @property
    def folder(self) -> Path:
        """The folder that holds all of the graph."""
        return self.path.parent


@dataclass(frozen=True)
class BuildResult:
    """What a build leaves behind besides the engine's files.

    Attributes:
        engine: name of the engine's main file in the folder.
        builder: what built it, with its version.
        log: what the builder printed.
        layers: how many layers it took, by type.
        precisions: how many of the graph's floating-point tensors have each dtype.
    """

    engine: str
    builder: str
    log: str
    layers: Mapping[str, int]
    precisions: Mapping[str, int]


T = TypeVar("T", bound=Target)


class Backend(Protocol[T]):
    """What builds and runs engines. ``T`` is the class of its targets.

    A third party registers one as an entry point of the group ``diffusion_engines.backends``, under
    the backend's name. DVC tracks files of this repository alone, so that its ``code`` is a
    committed file that names the package, e.g. ``conf/build/toy.yaml``; the package's version
    enters every fingerprint by itself.
    """

    @property
    def name(self) -> str:
        """As ``backend`` of its targets says, and as its package here is called."""

    @property
    def settings(self) -> type[T]:
        """The schema of its targets: a pydantic dataclass with :data:`STRICT`.

        Its ``backend`` is the literal name; its ``build`` is written in ``conf/build/``.
        """

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that its engines can have, by their names in ``precisions.py``."""

    @property
    def graph_format(self) -> str:
        """Of the graphs that it takes: ``onnx``, or ``exported_program``."""

    @property
    def code(self) -> str:
        """The file or folder of the repository that decides what a build writes."""

    @property
    def shared(self) -> str:
        """A second one, e.g. code that several backends build with.

        A backend without any names ``src/diffusion_engines/backends/base.py``.
        """

    @property
    def wrap_code(self) -> str:
        """The file or folder that decides what wrapping writes."""

    def check(self, target: T, precisions: Collection[str]) -> list[str]:
        """Return what does not fit in a target that is to have engines in these precisions.

        Each problem begins with the key below the target and ends with the file to edit:
        ``compute_capability: an A10 has 8.6, found 8.0 (conf/target/)``.
        """

    def device(self, target: T) -> str:
        """Return the PyTorch device that engines of a target run on: ``cpu`` or ``cuda``."""

    def timing(self, target: T) -> bool:
        """Whether builds for a target leave a timing cache and read that of an earlier one."""

    def builds_without_weights(self, target: T) -> bool:
        """Whether builds for a target read no weights; :meth:`wrap` adds them to a bundle then.

        Of ONNX, such a build gets the structure of a graph alone.
        """

    def check_hardware(self, target: T) -> None:
        """Ask whether this machine has the hardware that a target's engines run on.

        Libraries and their versions do not count: those are the fingerprint's.

        Raises:
            HardwareError: it has not.
        """

    def fingerprint(self, target: T) -> Mapping[str, object]:
        """Return what a build depends on beyond its graph and settings.

        Raises:
            HardwareError: this machine cannot build for the target.
        """

    def wrap_fingerprint(self, target: T) -> Mapping[str, object]:
        """Return what wrapping depends on beyond the engine.

        Raises:
            HardwareError: this machine cannot wrap the target's engines.
        """

    def build(
        self, graph: Graph, folder: Path, target: T, timing_cache: Path | None = None
    ) -> BuildResult:
        """Build an engine of a graph.

        Args:
            graph: to build; of the format ``graph_format``.
            folder: gets the engine's files.
            target: settings.
            timing_cache: of an earlier build with the same fingerprint, if there is one.

        Raises:
            BuildError: the library refused the graph, or built something else than asked for.
            HardwareError: the library is missing here.
        """

    def wrap(
        self, folder: Path, manifest: Engine, weights: Path | None = None
    ) -> Mapping[str, object]:
        """Add to a bundle that has the engine's files; return what its TorchScript depends on.

        Args:
            folder: of the bundle.
            manifest: of the engine.
            weights: for engines that have none; a diffusers folder for those of exported
                programs, the folder of a graph for those of its structure.

        Raises:
            BuildError, FingerprintError, HardwareError: it cannot be wrapped here.
        """

    def check_loadable(self, manifest: Engine) -> None:
        """Compare an engine's fingerprint with this machine, before anything is deserialized.

        Raises:
            IntegrityError: the manifest lacks a part of the fingerprint.
            FingerprintError: the engine is for another machine, or another library version.
            HardwareError: the library, or a GPU, is missing here.
        """

    def load(
        self,
        folder: Path,
        manifest: Engine,
        device: str,
        *,
        cuda_graph: bool = False,
        threads: int | None = None,
    ) -> nn.Module:
        """Return a bundle's engine as a module; call it only after :meth:`check_loadable`.

        The module takes tensors in the order of the trailing numbers of its inputs' names, and
        returns its outputs in that of theirs: a tensor where there is one, else a tuple.

        Args:
            folder: the bundle.
            manifest: of the bundle; ``preflight.recorded`` reads its fingerprint and settings.
            device: such as ``cuda``.
            cuda_graph: record a CUDA graph at the first call and replay it.
            threads: of the CPU for each call, of a backend with threads of its own; None: as many
                as the process may use. Those of PyTorch's are set by the caller.

        Raises:
            ConfigError: this backend has no CUDA graphs.
        """
