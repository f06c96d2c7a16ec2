"""Measure a graph with some groups of layers lowered, and keep what was measured.

What is kept lies beside DVC's own temporary files and outside of its outputs: no stage reads it,
and a search that was stopped goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx

from diffusion_engines import manifests
from diffusion_engines.config import EightBit
from diffusion_engines.errors import OutOfTimeError
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.lowering.groups import Group, layer_groups
from diffusion_engines.lowering.search import Lowered, Measured
from diffusion_engines.onnx.graph import MODEL, save_with_external_data
from diffusion_engines.onnx.quantize import layer_names, lower_precision, quantized_layers
from diffusion_engines.onnx.restoring import restore_layers
from diffusion_engines.onnx.versions import quantizer_versions
from diffusion_engines.parity.graphs import graph_differences
from diffusion_engines.progress import step
from diffusion_engines.results import read_result, write_result
from diffusion_engines.runtime.calls import Call, recorded_calls, spread

_STORE = Path(".dvc/tmp/quantize-auto")
# Raise it when `Measured`, or what is measured, changes.
_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """The graph that layers are lowered of.

    Attributes:
        component: that it is of.
        precision: int8 or fp8.
        source: the folder of the simplified graph.
        settings: of that precision, as they are in ``conf/``.
        calls: every recorded one.
        store: a folder for what is measured; another one where anything of this is another.
    """

    component: str
    precision: str
    source: Path
    settings: EightBit
    calls: Sequence[Call]
    store: Path


@dataclass(frozen=True)
class Measurements:
    """What was measured so far, by the names of the lowered groups."""

    found: Mapping[str, Measured]


def subject_of(
    workspace: Workspace, component: str, precision: str, source: str, settings: EightBit
) -> Subject:
    """Return what there is to lower, after checking its files.

    Raises:
        IntegrityError: the source graph or the reference is missing or damaged.
    """
    recorded = f"{component}.safetensors"
    with step(f"check the files of {source}"):
        manifests.read(workspace.onnx(source), manifests.Graph)
        reference = manifests.read(workspace.reference, manifests.Reference, only=(recorded,))
    follows_from = {
        "source": manifests.digest(workspace.onnx(source)),
        "reference": reference.files[recorded].sha256,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("kept", "rel_l2")},
        "precision": precision,
        "versions": quantizer_versions(),
        "version": _VERSION,
    }
    text = json.dumps(follows_from, sort_keys=True)
    name = f"{component}-{precision}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Subject(
        component,
        precision,
        workspace.onnx(source),
        settings,
        recorded_calls(workspace.reference / recorded),
        workspace.root / _STORE / name,
    )


class Laboratory:
    """Measures sets of groups until its time is up; what was measured before costs none.

    Args:
        subject: what is measured.
        deadline: by ``time.monotonic``; what has begun by then is finished.
        depth: of the groups, as of :func:`layer_groups`.
    """

    def __init__(self, subject: Subject, deadline: float, depth: int | None) -> None:
        self._subject, self._deadline = subject, deadline
        everything = subject.store / "everything"
        if not everything.is_dir():
            self._check_time()
            with new_folder(everything) as folder:
                _lower(subject, folder, [])
        self._lowered = onnx.load(everything / MODEL)
        self._source = onnx.load(subject.source / MODEL)
        kept = subject.settings.kept.get(subject.component, [])
        names = layer_names(self._source)
        self.groups = layer_groups(names, kept, quantized_layers(self._lowered), depth)
        self._layers = frozenset(names)
        self._path = subject.store / "measured.json"
        self._found: dict[str, Measured] = {}
        if self._path.is_file():
            fix = f"remove {self._path}: everything is then measured anew"
            read = read_result(self._path, Measurements, version=_VERSION, fix=fix)
            self._found.update(read.found)

    def __len__(self) -> int:
        """Return how many sets were measured, before or now."""
        return len(self._found)

    def measure(self, lowered: Lowered) -> Measured:
        """Return what a graph costs in which these groups are lowered, and no other layers.

        It is made of the graph with all layers lowered (:mod:`diffusion_engines.onnx.restoring`).

        Raises:
            OutOfTimeError: it was not measured before, and time is up.
        """
        return self._once("restored", lowered, self._write_restored)

    def measure_built(self, lowered: Lowered) -> Measured:
        """Return what the graph costs that the stage `quantize` makes of this choice.

        Raises:
            OutOfTimeError: as of :meth:`measure`.
        """

        def write(lowered: Lowered, folder: Path) -> None:
            _lower(self._subject, folder, patterns_of(self.groups, lowered))

        return self._once("built", lowered, write)

    def _once(
        self, kind: str, lowered: Lowered, write: Callable[[Lowered, Path], None]
    ) -> Measured:
        # By layers and not by names of groups, which mean others at another depth.
        nodes = sorted(node for one in self.groups if one.name in lowered for node in one.nodes)
        key = hashlib.sha256("\n".join([kind, *nodes]).encode()).hexdigest()[:16]
        if key not in self._found:
            self._check_time()
            what = f"{len(lowered)} of {len(self.groups)} groups lowered"
            with tempfile.TemporaryDirectory(dir=self._subject.store) as name:
                write(lowered, Path(name))
                size = sum(file.stat().st_size for file in Path(name).glob(f"{MODEL}*"))
                calls = graph_differences(Path(name) / MODEL, self._subject.calls, what)
            self._found[key] = Measured(calls, size)
            write_result(self._path, Measurements(self._found), version=_VERSION)
        return self._found[key]

    def _write_restored(self, lowered: Lowered, folder: Path) -> None:
        low = {node for group in self.groups if group.name in lowered for node in group.nodes}
        model = restore_layers(self._lowered, self._source, self._layers - low)
        save_with_external_data(model, folder / MODEL)

    def _check_time(self) -> None:
        if time.monotonic() >= self._deadline:
            raise OutOfTimeError(
                "time is up before the search has ended",
                expected="more minutes, in this run or in several",
                found=f"{len(self._found)} graphs measured" if hasattr(self, "_found") else "none",
                fix="run the same command again: it goes on from here",
            )


def patterns_of(groups: Sequence[Group], lowered: Lowered) -> list[str]:
    """Return what ``quantize.*.kept`` has to say so that exactly these groups are lowered."""
    return [group.pattern for group in groups if group.name not in lowered]


def _lower(subject: Subject, folder: Path, kept: Sequence[str]) -> None:
    calls = [inputs for inputs, _ in subject.calls]
    with step(f"{subject.precision}, {len(kept)} patterns kept"):
        lower_precision(
            subject.source,
            folder,
            spread(calls, subject.settings.calls),
            subject.component,
            subject.precision,
            replace(subject.settings, kept={subject.component: [*kept]}),
            subject.store / "logs",
        )
