"""Put the proven engines of a fleet into a release.

Proven is a target whose validation passed, and whose timings were taken, on exactly the bytes that
are there now. Nothing else is published, and each refusal has its reason.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from diffusion_engines import manifests
from diffusion_engines.backends.targets import device_of_engine
from diffusion_engines.bench.results import read_benchmark
from diffusion_engines.errors import IntegrityError
from diffusion_engines.families import family_of
from diffusion_engines.files import copy_files, new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle, Pipeline
from diffusion_engines.parity.results import Validation, read_validation
from diffusion_engines.release.profiles import (
    Made,
    Profile,
    Receipt,
    Release,
    write_receipt,
    write_release,
)
from diffusion_engines.release.proofs import check_passed, check_same_bytes, timing_from_benchmark
from diffusion_engines.serve.loading import check_complete


def publish(
    workspace: Workspace, targets: Sequence[str], folder: Path
) -> tuple[Release, dict[str, str]]:
    """Write a release of all proven targets; return it, and why each other target is not in it.

    Args:
        workspace: with the bundles and what was measured of them.
        targets: of the fleet.
        folder: of the release, which takes the place of an earlier one.

    Raises:
        IntegrityError: no target is proven; then an earlier release stays as it is.
    """
    commit, clean = _commit(workspace.root)
    profiles: list[Profile] = []
    refused: dict[str, str] = {}
    models: set[str] = set()
    with new_folder(folder) as release:
        for target in targets:
            try:
                receipt, profile = _prove(target, workspace, commit, clean)
            except IntegrityError as error:
                refused[target] = error.in_a_line
                continue
            own = release / target
            copy_files(workspace.bundles(target), own, skip=())
            size = sum(path.stat().st_size for path in own.rglob("*") if path.is_file())
            digest = write_receipt(receipt, own)
            profiles.append(replace(profile, bytes=size, receipt=digest))
            models.add(receipt.model)
        if not profiles:
            raise IntegrityError(
                "nothing can be published",
                expected="a target whose engines were validated and timed as they are now",
                found="\n".join(f"{name}: {why}" for name, why in refused.items()) or "no bundles",
                fix="`make repro`; of hardware elsewhere, `dvc pull` what was measured there",
            )
        if len(models) > 1:
            raise IntegrityError(
                "the targets are of different models",
                expected="one",
                found=", ".join(sorted(models)),
                fix="`make repro`, which builds all targets from the weights that there are",
            )
        made = Release(models.pop(), tuple(profiles))
        write_release(made, release)
    return made, refused


def _prove(target: str, workspace: Workspace, commit: str, clean: bool) -> tuple[Receipt, Profile]:
    """Return the receipt of a target's engines; raise IntegrityError where they are not proven."""
    folder = workspace.bundles(target)
    pipeline = manifests.read(workspace.pipeline(target), Pipeline)
    components = tuple(family_of(workspace.pipeline(target)).components)
    check_complete(folder, components)
    engines = {name: manifests.read(folder / name, Bundle) for name in components}
    digests = {name: manifests.digest(folder / name) for name in components}

    validation = read_validation(workspace.validation(target))
    check_same_bytes("validated", "validate", target, digests, validation.bundles)
    check_passed(validation)
    benchmark = read_benchmark(workspace.benchmark(target))
    check_same_bytes("timed", "benchmark", target, digests, benchmark.bundles)

    timing = timing_from_benchmark(benchmark)
    one = engines[components[0]]
    receipt = Receipt(
        target=target,
        model=pipeline.model,
        engines={name: _made(engine, validation) for name, engine in engines.items()},
        pictures=tuple((image.psnr, image.ssim) for image in validation.images),
        manifests=digests,
        timing=timing,
        commit=commit,
        clean=clean,
    )
    profile = Profile(
        target=target,
        backend=one.backend,
        device=device_of_engine(one),
        precisions={name: engine.precision for name, engine in engines.items()},
        timing=timing,
        bytes=None,
        manifests={**digests, "pipeline": manifests.digest(workspace.pipeline(target))},
        receipt=None,
    )
    return receipt, profile


def _made(engine: Bundle, validation: Validation) -> Made:
    parity = next(part for part in validation.components if part.component == engine.component)
    graph = engine.onnx
    return Made(
        precision=engine.precision,
        builder=engine.builder,
        settings=engine.settings,
        fingerprint=engine.fingerprint,
        graph=graph.name,
        graph_files={name: file.sha256 for name, file in graph.files.items()},
        opset=graph.opset,
        repo=graph.repo,
        revision=graph.revision,
        synthetic=graph.synthetic,
        weights=graph.weights,
        worst=asdict(parity.worst),
        gate=asdict(parity.gate),
    )


def _commit(root: Path) -> tuple[str, bool]:
    """Return the commit of a working copy, and whether nothing that git tracks differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise IntegrityError(
                "a receipt names the commit that engines were made with, and git gives none",
                found=done.stderr.strip(),
                fix="publish from a clone of the repository",
            )
        return done.stdout.strip()

    return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--untracked-files=no")
