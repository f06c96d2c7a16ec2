"""Validate the engines of a target on a recorded reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from diffusion_engines import manifests, precisions
from diffusion_engines.config import ImageGate, Validate
from diffusion_engines.errors import GateError
from diffusion_engines.families.base import Network, outputs_of
from diffusion_engines.layout import Workspace
from diffusion_engines.parity import scorers
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.gates import (
    gate_of,
    misses_of,
    misses_of_component,
    misses_of_latents,
    run_gates_of,
)
from diffusion_engines.parity.metrics import worst_difference
from diffusion_engines.parity.results import (
    ComponentParity,
    ImageParity,
    LatentsParity,
    Validation,
)
from diffusion_engines.parity.scorers import Scores
from diffusion_engines.parity.whole_runs import (
    Run,
    image_differences,
    latent_differences,
    reference_run,
    run_from_noise,
)
from diffusion_engines.progress import progress, step
from diffusion_engines.runtime.assemble import target_networks
from diffusion_engines.runtime.calls import Call, recorded_calls
from diffusion_engines.runtime.recording import picture


def validate_target(
    target: str,
    components: Mapping[str, str],
    tolerances: Validate,
    workspace: Workspace,
    *,
    device: str,
) -> tuple[Validation, list[Image.Image]]:
    """Compare every component on recorded inputs, then whole runs; return it with their images.

    What is out of tolerance is in the result, and no error here: it is to be written first.

    Args:
        target: whose bundles.
        components: those that have an engine, with their precisions.
        tolerances: by component and precision, and the folder of the scorers.
        workspace: has the bundles, the reference, and weights of what has no engine.
        device: where the engines take their inputs.

    Raises:
        ConfigError: there is no tolerance for a component in its precision.
        IntegrityError: a file of the reference, an engine or a scorer is damaged, or the reference
            has NaN or infinities.
    """
    gates = {name: gate_of(tolerances, name, p) for name, p in components.items()}
    # An image is judged by the lowest precision of its components.
    latents_gate, image_gate = run_gates_of(
        tolerances, precisions.lowest(list(components.values()))
    )
    with step("check the files of the reference"):
        manifests.read(workspace.reference, manifests.Reference)
    networks = target_networks(target, components, device, workspace=workspace)

    parts = []
    for name, precision in components.items():
        with step(f"compare {name} with the reference"):
            calls = recorded_calls(workspace.reference / f"{name}.safetensors")
            found = component_differences(name, networks[name], calls, device)
        misses = misses_of_component(f"{name} ({precision})", gates[name], found)
        parts.append(ComponentParity(name, precision, gates[name], found, tuple(misses)))

    with step("run the whole pipeline from the reference's noise"):
        reference = reference_run(workspace.reference)
        run = run_from_noise(networks, workspace, device)
    latents = latent_differences(run, reference)
    scores = _scores(run, reference, workspace, tolerances)
    result = Validation(
        target=target,
        components=tuple(parts),
        latents=LatentsParity(
            latents_gate, tuple(latents), tuple(misses_of_latents(latents_gate, latents))
        ),
        image_gate=image_gate,
        images=_images(run, reference, image_gate, scores),
        not_scored={name: found.missing for name, found in scores.items() if found.missing},
        bundles={name: manifests.digest(workspace.bundle(target, name)) for name in components},
    )
    return result, [picture(image) for image in run.images]


def judge(result: Validation, alternative_to: str | None, where: Path) -> str:
    """Return what to say of a target's tolerances.

    Args:
        result: of the target.
        alternative_to: the target in whose place it may be loaded; None: it is no alternative. One
            that misses a tolerance is passed over by the stage `choose`, and nothing is lost.
        where: its measurements are, for the message.

    Raises:
        GateError: a tolerance is missed, and not by an alternative.
    """
    misses = result.misses
    if not misses:
        return "  within tolerance"
    text = f"the engines of {result.target} miss {len(misses)} tolerance(s):\n  - " + "\n  - ".join(
        misses[:20]
    )
    if alternative_to is not None:
        return f"  {text}\n  as an alternative to {alternative_to} they are passed over"
    raise GateError(
        text,
        fix="if the precision is known to cost this much, widen its tolerance in\n"
        f"conf/validate/; the measurements are in {where}",
    )


def component_differences(
    name: str, network: Network, calls: list[Call], device: str
) -> tuple[Difference, ...]:
    """Compare a component with each of its recorded calls; ``name`` is for the log."""
    found = []
    for inputs, expected in progress(calls, name):
        with torch.no_grad():
            outputs = outputs_of(network(*(tensor.to(device) for tensor in inputs)))
        found.append(worst_difference([value.float().cpu() for value in outputs], expected))
    return tuple(found)


def _images(
    run: Run, reference: Run, gate: ImageGate, scores: Mapping[str, Scores]
) -> tuple[ImageParity, ...]:
    lpips, clip = scores["lpips"], scores["clip"]
    return tuple(
        ImageParity(
            file=f"image-{index:02d}.png",
            psnr=found["psnr"],
            ssim=found["ssim"],
            misses=tuple(misses_of(f"image {index}", asdict(gate), found)),
            lpips=lpips.images[index] if lpips.images else None,
            clip=clip.images[index] if clip.images else None,
            clip_reference=clip.reference[index] if clip.reference else None,
        )
        for index, found in enumerate(image_differences(run, reference))
    )


def _scores(
    run: Run, reference: Run, workspace: Workspace, tolerances: Validate
) -> dict[str, Scores]:
    folder, found = workspace.root / tolerances.scorers, {}
    for name, scorer in (("lpips", scorers.lpips), ("clip", scorers.clip_score)):
        with step(f"score the images, {name}"):
            found[name] = scorer(run, reference, folder)
        if found[name].missing:
            print(f"  {name}: not measured, {found[name].missing}")
    return found
