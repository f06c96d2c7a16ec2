"""What a folder of artifacts/ holds, in its ``manifest.json``: a frozen dataclass for each kind.

Whoever writes a folder and whoever reads it share the type. Every file is listed with its size and
SHA-256: DVC itself does not notice a corrupt file in its cache.

Each format has more keys than the one before, and is else the same; the first had no number. What a
field's default says is true of a manifest that lacks its key.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diffusion_engines.errors import IntegrityError
from diffusion_engines.families.base import OutputSpec, TensorSpec
from diffusion_engines.files import MANIFEST, read_json, sha256_of_file, write_json
from diffusion_engines.results import first_problem

# Raise it when a key is added, goes, or changes its meaning.
FORMAT = 3


@dataclass(frozen=True)
class File:
    """One file of a folder."""

    bytes: int
    sha256: str


Files = Mapping[str, File]


@dataclass(frozen=True)
class FusedLora:
    """A LoRA in the weights of one network: its file, its weight, how many layers it changed."""

    file: str
    sha256: str
    weight: float
    layers: int

    def __str__(self) -> str:
        return f"{self.file} × {self.weight:g} (sha256 {self.sha256[:12]})"


@dataclass(frozen=True)
class AddedWord:
    """A word of textual inversion in a text encoder: its file, and of how many vectors it is."""

    file: str
    sha256: str
    word: str
    vectors: int


@dataclass(frozen=True)
class Weights:
    """One folder of a diffusers model.

    Attributes:
        model: its name in the config.
        source: ``hub``, ``local`` or ``synthetic``.
        repo, revision: on the hub.
        synthetic: whether the weights are random numbers.
        seed: of those.
        parameters: how many; None: the folder is no network.
        loras: that were fused into it.
        words: that were added to it.
    """

    kind: ClassVar[str] = "weights"

    model: str
    source: str
    repo: str | None
    revision: str | None
    synthetic: bool
    seed: int | None
    parameters: int | None = None
    loras: tuple[FusedLora, ...] = ()
    words: tuple[AddedWord, ...] = ()
    files: Files = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A SHA-256 over all files: of a network, what its graph follows from."""
        listed = {name: file.sha256 for name, file in self.files.items()}
        return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """The recorded fp32 pipeline; ``frames``: pictures along the first trajectory."""

    kind: ClassVar[str] = "reference"

    frames: int
    files: Files = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """One component in one precision, as ONNX.

    Attributes:
        graph_format: ``onnx``, or ``exported_program``, which has no weights.
        inputs, outputs: in the order in which the component takes and gives them.
        guidance: whether a call has the two halves of classifier-free guidance.
        versions: of the libraries that made it.
        model, synthetic, loras, repo, revision, seed: of its weights; see :class:`Weights`. Without
            weights they are empty, up to the bundle of an engine, which has some.
        opset: of ONNX; 0: a program has none.
        weights: ``digest`` of the network's weights; None: of format 1, or without weights.
        compared: whether ONNX Runtime was compared with the reference on it.
        simplify_rel_l2: what simplifying it cost; None: not measured.
        quantization: settings, source, and what became of the layers; None: as it was exported.
    """

    kind: ClassVar[str] = "onnx"

    name: str
    component: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    guidance: bool
    exporter: str
    opset: int
    patches: tuple[str, ...]
    versions: Mapping[str, str]
    model: str | None
    synthetic: bool
    loras: tuple[FusedLora, ...]
    graph_format: str = "onnx"
    repo: str | None = None
    revision: str | None = None
    seed: int | None = None
    weights: str | None = None
    compared: bool = False
    simplify_rel_l2: float | None = None
    quantization: Mapping[str, Any] | None = None
    files: Files = field(default_factory=dict)

    @property
    def without_weights(self) -> bool:
        """Whether it has none: those of an engine of it come with the bundle."""
        return self.model is None


@dataclass(frozen=True)
class Program(Graph):
    """One component in one precision, as an exported program."""

    kind: ClassVar[str] = "exported_program"


@dataclass(frozen=True)
class Structure(Graph):
    """A graph without its weights, which those of any fine-tune of its network fit."""

    kind: ClassVar[str] = "structure"


@dataclass(frozen=True)
class Engine:
    """A component, built for a target.

    Attributes:
        name: such as ``a10-unet``.
        backend, builder: what built it; the latter with its version.
        settings: of the target, which its backend reads (``preflight.recorded``).
        fingerprint: what it depends on beyond graph and settings; its backend reads it too.
        engine: its main file.
        layers: how many, by type.
        dtypes: how many of the graph's floating-point tensors have each.
        onnx: the graph that it was built from, and so its weights, where it has any.
    """

    kind: ClassVar[str] = "engine"

    name: str
    target: str
    component: str
    precision: str
    backend: str
    builder: str
    settings: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    engine: str
    layers: Mapping[str, int]
    dtypes: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputSpec, ...]
    guidance: bool
    model: str | None
    synthetic: bool
    loras: tuple[FusedLora, ...]
    onnx: Graph
    files: Files = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle(Engine):
    """An engine that can be loaded: its fields, and what wrapping added to them.

    ``torchscript``: files for PyTorch, and what they depend on; empty: there are none.
    """

    kind: ClassVar[str] = "bundle"

    torchscript: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline needs besides its engines.

    Attributes:
        model, repo, revision, synthetic, seed: of its weights; see :class:`Weights`.
        loras: that were fused, by the network's folder.
        weights: ``digest`` of each folder of the model, networks among them; empty: of format 1.
    """

    kind: ClassVar[str] = "pipeline"

    model: str
    repo: str | None
    revision: str | None
    synthetic: bool
    loras: Mapping[str, tuple[FusedLora, ...]]
    seed: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    files: Files = field(default_factory=dict)


Manifest = Weights | Reference | Graph | Engine | Pipeline
M = TypeVar("M", Weights, Reference, Graph, Program, Structure, Engine, Bundle, Pipeline)


def graph_from_weights(
    weights: Weights,
    *,
    name: str,
    component: str,
    precision: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[OutputSpec],
    guidance: bool,
    exporter: str,
    opset: int,
    patches: Sequence[str],
    versions: Mapping[str, str],
) -> Graph:
    """Return the manifest of a graph that was exported from a network's weights."""
    return Graph(
        name=name,
        component=component,
        precision=precision,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        guidance=guidance,
        exporter=exporter,
        opset=opset,
        patches=tuple(patches),
        versions=versions,
        **_origin(weights),
    )


def _origin(weights: Weights) -> dict[str, Any]:
    """Return what a graph's manifest says of its weights."""
    return {
        "model": weights.model,
        "synthetic": weights.synthetic,
        "loras": weights.loras,
        "repo": weights.repo,
        "revision": weights.revision,
        "seed": weights.seed,
        "weights": weights.digest,
    }


# What a graph's manifest says that has none, and of what was measured with them.
_NO_WEIGHTS: Mapping[str, Any] = {
    "model": None,
    "synthetic": False,
    "loras": (),
    "repo": None,
    "revision": None,
    "seed": None,
    "weights": None,
    "compared": False,
    "simplify_rel_l2": None,
}


def program_without_weights(
    *,
    name: str,
    component: str,
    precision: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[OutputSpec],
    guidance: bool,
    versions: Mapping[str, str],
) -> Program:
    """Return the manifest of an exported program, which any weights of its network fit."""
    return Program(
        name=name,
        component=component,
        precision=precision,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        guidance=guidance,
        exporter="torch.export",
        opset=0,
        patches=(),
        versions=versions,
        model=None,
        synthetic=False,
        loras=(),
        graph_format="exported_program",
    )


def structure_of_graph(graph: Graph) -> Structure:
    """Return the manifest of a graph's structure: equal for all fine-tunes of its network."""
    kept = {value.name: getattr(graph, value.name) for value in fields(Graph)}
    return Structure(**{**kept, **_NO_WEIGHTS, "files": {}})


def engine_with_weights(engine: Engine, weights: Weights) -> Engine:
    """Return the manifest of an engine of a program, with the weights that were added to it."""
    return engine_with_graph(engine, replace(engine.onnx, **_origin(weights)))


def engine_with_graph(engine: Engine, graph: Graph) -> Engine:
    """Return the manifest of an engine of a structure, with the graph whose weights were added."""
    return replace(
        engine, model=graph.model, synthetic=graph.synthetic, loras=graph.loras, onnx=graph
    )


def engine_from_graph(
    graph: Graph,
    *,
    name: str,
    target: str,
    backend: str,
    builder: str,
    settings: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    engine: str,
    layers: Mapping[str, int],
    dtypes: Mapping[str, int],
) -> Engine:
    """Return the manifest of an engine that was built from a graph."""
    return Engine(
        name=name,
        target=target,
        component=graph.component,
        precision=graph.precision,
        backend=backend,
        builder=builder,
        settings=settings,
        fingerprint=fingerprint,
        engine=engine,
        layers=layers,
        dtypes=dtypes,
        inputs=graph.inputs,
        outputs=graph.outputs,
        guidance=graph.guidance,
        model=graph.model,
        synthetic=graph.synthetic,
        loras=graph.loras,
        onnx=graph,
    )


def bundle_from_engine(engine: Engine, torchscript: Mapping[str, Any]) -> Bundle:
    """Return the manifest of a bundle of an engine."""
    of_the_engine = {value.name: getattr(engine, value.name) for value in fields(Engine)}
    return Bundle(**of_the_engine, torchscript=torchscript)


def write(folder: Path, manifest: Manifest) -> None:
    """Describe ``folder``; ``files`` of ``manifest`` are left out for those that lie in it."""
    files = {
        path.relative_to(folder).as_posix(): File(path.stat().st_size, sha256_of_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    listed = {name: asdict(file) for name, file in files.items()}
    written = asdict(manifest) | {"kind": manifest.kind, "format": FORMAT, "files": listed}
    write_json(folder / MANIFEST, written)


def digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's manifest, which stands for all files in it."""
    return sha256_of_file(folder / MANIFEST)


def read(
    folder: Path,
    kind: type[M],
    *,
    verify: bool = True,
    only: Sequence[str] | None = None,
    skip: str = "",
) -> M:
    """Return the manifest of ``folder`` after checking the files that it names.

    Where all of them are checked, the folder holds nothing else: libraries look for files by name,
    and a tokenizer that finds an ``added_tokens.json`` reads it.

    Args:
        folder: that was written with :func:`write`.
        kind: what it must hold.
        verify: whether to check the files.
        only: which files to check; None: all.
        skip: a pattern; files that match are not checked, for who does not read them.

    Raises:
        IntegrityError: the manifest is missing, of a later format, or describes something else
            than a ``kind``; a key is missing, unknown or wrong; a file is missing, truncated,
            altered, not listed or outside of the folder.
    """
    remedy = (
        f"remove the damaged copy, then any damage in DVC's cache, and make it again:\n"
        f"`rm -rf {folder}`, `diffusion-engines verify`, `dvc repro`.\n"
        "On a server: copy the folder again."
    )
    found = read_json(folder / MANIFEST)
    if not (isinstance(found, dict) and isinstance(found.get("files"), dict)):
        raise IntegrityError(
            f"{folder / MANIFEST} is no manifest", expected="the files and their hashes", fix=remedy
        )
    if found.get("kind") != kind.kind:
        raise IntegrityError(
            f"{folder} holds something else", expected=kind.kind, found=str(found.get("kind"))
        )
    _check_format(folder, found.get("format", 1))
    manifest = _validated(folder, kind, found)
    _check_names(folder, manifest.files)
    if verify:
        for name, recorded in manifest.files.items():
            if fnmatch.fnmatch(name, skip) or (only is not None and name not in only):
                continue
            _verify_file(folder / name, recorded, remedy)
        if only is None and not skip:
            _check_nothing_else(folder, manifest.files)
    return manifest


def _check_names(folder: Path, files: Files) -> None:
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or parts.as_posix() != name or name == ".":
            raise IntegrityError(
                f"{folder / MANIFEST} names a file in another way than one inside of its folder",
                expected="a path below the folder, such as tokenizer/vocab.json",
                found=repr(name),
                fix="use only folders from those whom you trust: `dvc repro` or `dvc pull` makes\n"
                "this one again",
            )


def _check_nothing_else(folder: Path, files: Files) -> None:
    others = sorted(set(_entries(folder)) - set(files) - {MANIFEST})
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise IntegrityError(
            f"{folder} holds files that its manifest does not list",
            expected="what was written there with it, and nothing else",
            found=", ".join(others[:5]) + more,
            fix="remove them, or copy the folder again: a library may read them unasked",
        )


def _entries(folder: Path) -> Iterator[str]:
    """Yield all that is not a folder, by its path; a link to a folder is no folder."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _check_format(folder: Path, number: object) -> None:
    if number not in range(1, FORMAT + 1):
        raise IntegrityError(
            f"{folder / MANIFEST} has another format than this version of diffusion-engines reads",
            expected=f"format {FORMAT} or an earlier one",
            found=f"format {number}",
            fix="install the version of diffusion-engines that wrote it, or make it again with\n"
            f"this one: `rm -rf {folder}`, then `dvc repro`",
        )


def _adapter(kind: Any) -> TypeAdapter[Any]:
    # A key that no format has is a damaged one, whose field would get its default without a word.
    # None: pydantic gives a configuration to what is in a type, and to no dataclass that is one.
    return TypeAdapter(kind | None, config=ConfigDict(extra="forbid"))


def _validated(folder: Path, kind: type[M], found: dict[str, Any]) -> M:
    known = {key: value for key, value in found.items() if key not in ("kind", "format")}
    try:
        manifest: M = _adapter(kind).validate_python(known)
        return manifest
    except ValidationError as error:
        raise IntegrityError(
            f"{folder / MANIFEST} is incomplete or damaged",
            expected=f"what {kind.__name__} has in `diffusion_engines.manifests`",
            found=first_problem(error),
            fix="make it again with this version of diffusion-engines: "
            f"`rm -rf {folder}`,\nthen `dvc repro`. On a server: copy the folder again.",
        ) from error


def _verify_file(path: Path, recorded: File, remedy: str) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", expected="as in manifest.json", fix=remedy)
    if (size := path.stat().st_size) != recorded.bytes:
        raise IntegrityError(
            f"{path} has the wrong size",
            expected=f"{recorded.bytes} bytes",
            found=f"{size} bytes",
            fix=remedy,
        )
    if (digest := sha256_of_file(path)) != recorded.sha256:
        raise IntegrityError(
            f"{path} is damaged",
            expected=f"sha256 {recorded.sha256}",
            found=f"sha256 {digest}",
            fix=remedy,
        )
