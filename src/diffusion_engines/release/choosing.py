"""Which profile of a release this machine takes, and why it takes none of the others."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusion_engines import manifests
from diffusion_engines.backends import backend
from diffusion_engines.errors import ConfigError, FingerprintError, HardwareError, IntegrityError
from diffusion_engines.machines import this_machine
from diffusion_engines.manifests import Bundle
from diffusion_engines.release.chosen import CHOSEN, Chosen, read_chosen
from diffusion_engines.release.profiles import Profile, check_profile, read_release

Fallback = Literal["error", "generic", "pytorch"]
logger = logging.getLogger("diffusion_engines.release")
# How often this process took something else than engines that were timed on its kind of machine
# although there are some, by what it took: for a server's metrics.
FALLBACKS: Counter[str] = Counter()


@dataclass(frozen=True)
class Considered:
    """A profile, and how it fits a machine.

    Attributes:
        profile: of the release.
        own: whether its timings are of this kind of machine.
        reason: why it cannot be loaded here; None: it can.
    """

    profile: Profile
    own: bool
    reason: str | None


def consider(
    release: Path, device: str | None = None, machine: Mapping[str, Any] | None = None
) -> list[Considered]:
    """Return all profiles of a release in the order in which a machine prefers them.

    First come those that were timed on its kind of machine, the fastest first; then the others,
    those for GPUs before those for CPUs. Nothing is deserialized.

    Args:
        release: its folder.
        device: ``cpu`` or ``cuda``; None: either.
        machine: as of :func:`diffusion_engines.machines.this_machine`; None: this one.

    Raises:
        IntegrityError: the release, a receipt or a manifest is missing or altered.
    """
    here = this_machine() if machine is None else machine
    found = []
    for profile in read_release(release).profiles:
        check_profile(profile, release)
        own = profile.timing is not None and _same_kind(profile, profile.timing.machine, here)
        found.append(Considered(profile, own, _reason(profile, release, device)))
    return sorted(found, key=_preference)


def choose_alternatives(artifacts: Path, device: str | None = None) -> tuple[Path, dict[str, Path]]:
    """Return the engines that the stage `choose` found the fastest for this machine's hardware.

    Args:
        artifacts: with ``alternatives/`` and ``bundles/``, as the stages leave them.
        device: as of :func:`consider`.

    Returns:
        The folder of a target, which has what a pipeline needs besides engines, and the bundle of
        each component, which may be of another target for the same hardware.

    Raises:
        IntegrityError: engines are not those that were chosen among.
        FingerprintError: no choice can be loaded here, or there is none; it says why for each.
    """
    here = this_machine()
    reasons: dict[str, str] = {}
    found = [read_chosen(path.parent) for path in artifacts.glob(f"alternatives/*/{CHOSEN}")]
    for one in sorted(found, key=lambda chosen: _hardware_preference(chosen, here)):
        bundles = artifacts / "bundles"
        engines = {name: bundles / pick.target / name for name, pick in one.components.items()}
        _check_chosen(one, engines)
        reason = _wrong_device(one.profiles[0], device) or _not_loadable([*engines.values()])
        if reason is None:
            taken = ", ".join(f"{name} {pick.target}" for name, pick in one.components.items())
            logger.info("%s: for the hardware of %s: %s", artifacts, one.target, taken)
            return bundles / one.target, engines
        reasons[one.target] = reason
    targets = sorted(path.name for path in artifacts.glob("bundles/*"))
    raise FingerprintError(
        f"none of the engines that were chosen in {artifacts} can be loaded",
        expected="a choice between targets for the hardware of this machine (stage `choose`)",
        found="\n".join(f"{name}: {reason}" for name, reason in reasons.items())
        or "no choice: this fleet has no measured alternatives",
        fix=f"name a target: load_pipeline(…, target=…), of {', '.join(targets) or 'none'}",
    )


def _hardware_preference(one: Chosen, here: Mapping[str, Any]) -> tuple[bool, bool, str]:
    profile = one.profiles[0]
    own = profile.timing is not None and _same_kind(profile, profile.timing.machine, here)
    return not own, profile.device == "cpu", one.target


def _check_chosen(one: Chosen, engines: Mapping[str, Path]) -> None:
    """Raise IntegrityError where engines are others than those that were compared."""
    profiles = {profile.target: profile for profile in one.profiles}
    for name, folder in engines.items():
        expected = profiles[one.components[name].target].manifests[name]
        if not folder.is_dir() or (found := manifests.digest(folder)) != expected:
            raise IntegrityError(
                f"{folder} is not what the stage `choose` compared",
                expected=f"a manifest of sha256 {expected[:12]}",
                found=found[:12] if folder.is_dir() else "no such folder",
                fix=f"`dvc repro choose@{one.target}`, or `dvc checkout`",
            )


def profile_of(release: Path, target: str) -> Path:
    """Return the folder of one profile of a release, compared with what the release says of it.

    Raises:
        ConfigError: there is no such profile.
        IntegrityError: the release, its receipt or a manifest is missing or altered.
    """
    profiles = {profile.target: profile for profile in read_release(release).profiles}
    if target not in profiles:
        raise ConfigError(
            f"{release} has no profile {target}", expected=", ".join(profiles), found=target
        )
    check_profile(profiles[target], release)
    return release / target


def choose(release: Path, device: str | None = None, fallback: Fallback = "error") -> Path | None:
    """Return the folder of the engines that this machine takes; None: those of PyTorch.

    Args:
        release: its folder.
        device: as of :func:`consider`.
        fallback: where engines were timed on this kind of machine and can no longer be loaded, as
            after an update of its driver: ``error`` raises, ``generic`` takes what can be loaded,
            ``pytorch`` takes none. The latter two are logged and counted in :data:`FALLBACKS`.

    Raises:
        IntegrityError: as of :func:`consider`.
        FingerprintError: nothing that may be taken can be loaded here; it says why for each.
    """
    considered = consider(release, device)
    fitting = next((one for one in considered if one.reason is None), None)
    lost = [one for one in considered if one.own and one.reason is not None]
    for one in considered:
        state = "can be loaded here" if one.reason is None else one.reason
        logger.info("%s, profile %s: %s", release, one.profile.target, state)
    if fitting is not None and (fitting.own or not lost):
        logger.info("%s: the profile %s is taken", release, fitting.profile.target)
        return release / fitting.profile.target
    if fallback == "pytorch":
        return _fall_back("pytorch", "PyTorch is", lost, None)
    if fallback == "generic" and fitting is not None:
        target = fitting.profile.target
        return _fall_back(target, f"the profile {target} is", lost, release / target)
    raise FingerprintError(
        f"no profile of {release} that is for this machine can be loaded",
        expected=" or ".join(one.profile.target for one in lost or considered),
        found="\n".join(f"{one.profile.target}: {one.reason or 'generic'}" for one in considered),
        fix="build and publish for this machine: `make repro`, `make publish`; until then\n"
        'load_pipeline(…, fallback="generic"), or fallback="pytorch" with weights=…',
    )


def _fall_back(taken: str, text: str, lost: list[Considered], folder: Path | None) -> Path | None:
    FALLBACKS[taken] += 1
    why = "; ".join(f"{one.profile.target}: {one.reason}" for one in lost)
    logger.warning("%s taken in place of engines for this machine (%s)", text, why or "no profile")
    return folder


def _same_kind(profile: Profile, timed: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two machines have the same hardware where a profile runs."""
    if profile.device == "cpu":
        return bool(timed["cpu"] == here["cpu"])
    return timed["gpus"][:1] == here["gpus"][:1] != []


def _reason(profile: Profile, release: Path, device: str | None) -> str | None:
    folders = [release / profile.target / name for name in profile.precisions]
    return _wrong_device(profile, device) or _not_loadable(folders)


def _wrong_device(profile: Profile, device: str | None) -> str | None:
    if device is not None and device.split(":")[0] != profile.device:
        return f"it runs on {profile.device}, not on {device}"
    return None


def _not_loadable(bundles: Sequence[Path]) -> str | None:
    for folder in bundles:
        manifest = manifests.read(folder, Bundle, verify=False)
        try:
            backend(manifest.backend).check_loadable(manifest)
        except (FingerprintError, HardwareError) as error:
            return error.in_a_line
    return None


def _preference(one: Considered) -> tuple[bool, bool, float, str]:
    timing = one.profile.timing
    return (
        not one.own,
        one.profile.device == "cpu",
        timing.picture_ms if timing else math.inf,
        one.profile.target,
    )
