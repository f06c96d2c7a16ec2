"""Search for the layers of a graph that can have 8 bits: ``diffusion-engines quantize-auto``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffusion_engines.config import EightBit, sections_from_config
from diffusion_engines.errors import ConfigError, GateError
from diffusion_engines.layout import Workspace
from diffusion_engines.lowering.measuring import Laboratory, patterns_of, subject_of
from diffusion_engines.lowering.option import Choice, check_option, write_option, write_tables
from diffusion_engines.lowering.search import Measured, search
from diffusion_engines.parity.gates import gate_of, misses_of_component
from diffusion_engines.precisions import graph_name
from diffusion_engines.runs import only_run
from diffusion_engines.yaml_files import PARAMS, read_mapping

_EIGHT_BIT = ("int8", "fp8")


def quantize_auto(
    root: Path,
    graph: str,
    *,
    minutes: float,
    option: str,
    base: str,
    depth: int | None = None,
    rel_l2: float | None = None,
) -> tuple[Path, Choice]:
    """Find as many layers to lower as the gates allow; write them as an option of conf/quantize/.

    The gates are those of the stages `quantize` and `validate` on the recorded calls. A choice
    counts where the graph that the stage makes of it is within them.

    Args:
        root: of the repository.
        graph: such as ``unet-int8``.
        minutes: after which nothing new is measured; what was, is kept for the next run.
        option: the name of the file in conf/quantize/ that is written.
        base: the option that it changes.
        depth: of the groups, as of :func:`diffusion_engines.lowering.groups.layer_groups`.
        rel_l2: a stricter tolerance than that of the gates; None: theirs.

    Returns:
        the file that was written, and what it chooses.

    Raises:
        BusyError: a run works there.
        ConfigError: there is no such graph, or the option is somebody's.
        GateError: nothing can be lowered.
        HardwareError: ModelOpt is not installed.
        IntegrityError: the graph's source or the reference is missing or damaged.
        OutOfTimeError: nothing was found yet.
    """
    deadline = time.monotonic() + 60 * minutes
    component, _, precision = graph.rpartition("-")
    folder = root / "conf" / "quantize"
    path = folder / f"{option}.yaml"
    check_option(path)
    if not (folder / f"{base}.yaml").is_file() or option == base:
        raise ConfigError(
            f"conf/quantize/{option}.yaml cannot change the option {base}",
            expected="another option of that folder",
            found=", ".join(sorted(file.stem for file in folder.glob("*.yaml"))),
            fix="name one with --base",
        )
    params: Any = OmegaConf.to_container(read_mapping(root / PARAMS))
    sections = sections_from_config(params, ["quantize", "validate"])
    if precision not in _EIGHT_BIT or component not in sections["validate"].components:
        raise ConfigError(
            f"{graph} is no graph in 8 bits",
            expected=" or ".join(f"unet-{name}" for name in _EIGHT_BIT),
            found=graph,
            fix="name a component of the model and a precision",
        )
    settings = sections["quantize"].settings(precision)
    assert isinstance(settings, EightBit)
    gate = gate_of(sections["validate"], component, precision)
    allowed = min(gate.rel_l2, settings.rel_l2, *([] if rel_l2 is None else [rel_l2]))

    def passes(measured: Measured) -> bool:
        misses = misses_of_component(graph, gate, measured.calls)
        return not misses and measured.rel_l2 <= allowed

    workspace = Workspace(root)
    with only_run(root):
        source = graph_name(component, settings.source)
        _check_there(workspace, source)
        subject = subject_of(workspace, component, precision, source, settings)
        laboratory = Laboratory(subject, deadline, depth)
        names = [group.name for group in laboratory.groups]
        print(f"{len(names)} groups, {len(laboratory)} sets of them measured before", flush=True)
        found = search(names, laboratory.measure, laboratory.measure_built, passes)
    if found is None or found.chosen.measured is None:
        raise GateError(
            f"nothing of {component} can be lowered",
            expected=f"relative L2 error of at most {allowed:.2e} at every call, and {gate}",
            fix=f"allow more in validate.components.{component}.{precision} (conf/validate/) and\n"
            f"quantize.{precision}.rel_l2 (conf/quantize/), or with --rel-l2",
        )
    choice = Choice(
        component,
        precision,
        allowed,
        found,
        found.chosen.measured,
        found.chosen.lowered,
        patterns_of(laboratory.groups, frozenset(found.chosen.lowered)),
    )
    write_option(path, choice, base)
    write_tables(workspace.quantize_auto(graph), choice)
    return path, choice


def _check_there(workspace: Workspace, source: str) -> None:
    for path, stage in (
        (workspace.onnx(source), f"simplify@{source}"),
        (workspace.reference, "reference"),
    ):
        if not path.is_dir():
            raise ConfigError(
                f"{path} does not exist, which a search measures on",
                expected="the simplified graph and the reference",
                found="no such folder",
                fix=f'`make params ARGS=fleet=precisions`, then `dvc repro "{stage}"`',
            )
