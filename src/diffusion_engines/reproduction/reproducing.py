"""Make a bundle again and compare: equal bytes, or within the gates, or not the same engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusion_engines.backends import backend
from diffusion_engines.backends.targets import device_of_engine, target_from_settings
from diffusion_engines.config import Gate
from diffusion_engines.environments import Environment, Other, others_here
from diffusion_engines.errors import ConfigError, FingerprintError, HardwareError
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle
from diffusion_engines.parity.distances import Difference, worst_of
from diffusion_engines.plan.reading import parse_yaml_12
from diffusion_engines.reproduction.differences import differing_files
from diffusion_engines.reproduction.rebuilding import rebuilt
from diffusion_engines.reproduction.recipes import Recipe, find_recipe
from diffusion_engines.wording import some


@dataclass(frozen=True)
class Parity:
    """How far the engine made again is from the recorded reference.

    Attributes:
        worst: over all recorded calls.
        before: that of the bundle that was there; None: it cannot be loaded here.
        gate: what is allowed.
        misses: what is not.
    """

    worst: Difference
    before: Difference | None
    gate: Gate
    misses: tuple[str, ...]


@dataclass(frozen=True)
class Reproduction:
    """What came of making a bundle again.

    Attributes:
        differing: what differs, by file; empty: nothing does.
        seconds: that it took.
        parity: None: the bytes are equal, or nothing could be compared.
        not_run: why nothing could be compared.
    """

    differing: Mapping[str, list[str]]
    seconds: float
    parity: Parity | None = None
    not_run: str = ""

    @property
    def is_same(self) -> bool:
        """Whether the bytes are equal, or what the engine gives is within the gates."""
        return not self.differing or (self.parity is not None and not self.parity.misses)


def reproduce_bundle(root: Path, folder: Path, *, any_versions: bool = False) -> Reproduction:
    """Make a bundle again and say what differs; print how it was made, and what came of it.

    Args:
        root: of the repository.
        folder: of the bundle, here or in a release.
        any_versions: go on where libraries are of other versions than they were.

    Raises:
        ConfigError: the repository does not record the bundle, or versions are others.
        IntegrityError: the bundle is damaged, or its commit is not what made it.
        HardwareError: this machine cannot build it.
        BuildError: a stage failed.
    """
    recipe = find_recipe(root, folder)
    print_recipe(recipe)
    others = [*others_here([s.environment for s in recipe.steps if s.environment])]
    others += _other_fingerprint(recipe.bundle)
    if others and not any_versions:
        raise ConfigError(
            f"this machine has other versions than those that made {recipe.bundle.name}",
            expected="\n".join(f"{one.name} {one.expected}" for one in others),
            found="\n".join(f"{one.name} {one.found or 'none'}" for one in others),
            fix="take the environment of that commit: `git worktree add ../then "
            f"{recipe.commit[:12]}`, and\n`make env` there; or `--any-versions`, which says what "
            "comes of these",
        )
    for other in others:
        print(f"  other version: {other}")
    started = time.perf_counter()
    with rebuilt(root, recipe) as clone:
        seconds = time.perf_counter() - started
        again = clone / recipe.folder
        differing = differing_files(folder, again)
        found = Reproduction(differing, seconds)
        if differing:
            try:
                found = Reproduction(differing, seconds, _parity(folder, again, clone, recipe))
            except (FingerprintError, HardwareError, ConfigError) as error:
                found = Reproduction(differing, seconds, not_run=error.in_a_line)
    print_reproduction(recipe, found)
    return found


def _other_fingerprint(bundle: Bundle) -> list[Other]:
    """Return what a build depends on and is another here.

    Raises:
        HardwareError: this machine cannot build for the target.
    """
    here = backend(bundle.backend).fingerprint(target_from_settings(bundle.settings))
    return [
        Other(f"fingerprint.{key}", str(was), str(here.get(key)))
        for key, was in bundle.fingerprint.items()
        if here.get(key) != was
    ]


def _parity(folder: Path, again: Path, clone: Path, recipe: Recipe) -> Parity:
    """Compare an engine with the recorded calls of the reference, by the gates of its parameters.

    Raises:
        ConfigError: there is no gate.
        FingerprintError, HardwareError: it cannot be loaded here.
    """
    from diffusion_engines.parity.gates import misses_of_component
    from diffusion_engines.parity.validation import component_differences
    from diffusion_engines.runtime.bundle import load_bundle
    from diffusion_engines.runtime.calls import recorded_calls

    bundle = recipe.bundle
    gate = _gate(recipe)
    calls = recorded_calls(Workspace(clone).reference / f"{bundle.component}.safetensors")
    device = device_of_engine(bundle)

    def differences(of: Path) -> tuple[Difference, ...]:
        return component_differences(bundle.component, load_bundle(of, device), calls, device)

    found = differences(again)
    before = None
    with suppress(FingerprintError, HardwareError):
        before = worst_of(differences(folder))
    misses = misses_of_component(f"{bundle.component} ({bundle.precision})", gate, found)
    return Parity(worst_of(found), before, gate, tuple(misses))


def _gate(recipe: Recipe) -> Gate:
    component, precision = recipe.bundle.component, recipe.bundle.precision
    try:
        values = parse_yaml_12(recipe.params)["validate"]["components"][component][precision]
        return Gate(**values)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"validate.components.{component}.{precision} has no tolerance in the parameters of "
            f"{recipe.commit[:12]}",
            expected="rel_l2, max_abs and cosine",
        ) from error


def print_recipe(recipe: Recipe) -> None:
    """Say of which commit a bundle is, with which commands and versions."""
    bundle = recipe.bundle
    where = recipe.commit[:12]
    if not recipe.committed:
        state = "" if recipe.clean else ", with changes that nobody committed"
        where = f"{where}{state}; dvc.lock of the working copy records it"
    print(f"{bundle.name}: {bundle.builder}, of commit {where}")
    for step in recipe.steps:
        print(f"  {step.name}: {step.command}{_made_with(step.environment)}")
    if missing := [step.name for step in recipe.steps if step.environment is None]:
        print(f"  versions of libraries are not on record of {some(missing)}")
    sys.stdout.flush()  # before what the stages print


def _made_with(environment: Environment | None) -> str:
    if environment is None:
        return ""
    named = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "nvidia-modelopt")
    have = environment.libraries
    versions = [f"{name} {have[name]}" for name in named if name in have]
    return f"  ({', '.join([f'Python {environment.python}', *versions])})"


def print_reproduction(recipe: Recipe, found: Reproduction) -> None:
    """Say whether a bundle came out equal, and if not, what differs and what that means."""
    bundle = recipe.bundle
    print(f"{bundle.name}: made again in {found.seconds:.0f} s")
    if not found.differing:
        size = sum(file.bytes for file in bundle.files.values())
        count = f"{len(bundle.files)} file{'' if len(bundle.files) == 1 else 's'}"
        print(f"bit-identical: {count}, {size / 1e6:,.1f} MB, and the manifest")
        return
    print(f"not bit-identical: {len(found.differing)} of {len(bundle.files) + 1} files differ")
    for name, lines in found.differing.items():
        for line in lines[:12]:
            print(f"  {name}: {line}")
        if lines[12:]:
            print(f"  {name}: and {len(lines) - 12} more")
    if found.parity is None:
        print(f"its outputs were not compared: {found.not_run}")
        return
    parity = found.parity
    was = f" ({parity.before.rel_l2:.2e} before)" if parity.before else ""
    verdict = "outside of the gates" if parity.misses else "within the gates"
    print(
        f"{verdict}: relative L2 error {parity.worst.rel_l2:.2e}{was}, allowed "
        f"{parity.gate.rel_l2:.2e}; largest absolute {parity.worst.max_abs:.2e}, allowed "
        f"{parity.gate.max_abs:.2e}"
    )
    for miss in parity.misses[:5]:
        print(f"  {miss}")
