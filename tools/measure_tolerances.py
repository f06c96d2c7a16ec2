"""What each precision, and each kind of damage, does to the model: the ground of conf/validate/.

`python tools/measure_tolerances.py` after `dvc repro reference`; writes docs/tolerances.json and
prints what docs/tolerances.md tells of them. PyTorch computes in fp32, fp16 and bf16 itself, on the
CPU. The lower precisions are measured where their graphs are, in ONNX Runtime:
`make params ARGS=fleet=precisions && dvc repro --glob 'quantize@*'`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper

from diffusion_engines.families.base import Network
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.layout import Workspace
from diffusion_engines.onnx.graph import MODEL, save_with_external_data
from diffusion_engines.onnx.session import feeds_of, session_of
from diffusion_engines.parity.distances import worst_of
from diffusion_engines.parity.metrics import difference
from diffusion_engines.parity.validation import component_differences
from diffusion_engines.parity.whole_runs import (
    Run,
    image_differences,
    latent_differences,
    reference_run,
    run_from_noise,
)
from diffusion_engines.runtime.assemble import TorchNetwork, torch_networks
from diffusion_engines.runtime.calls import recorded_calls, spread
from diffusion_engines.runtime.recording import load_settings

NAMES = tuple(FAMILY.components)  # of the default model
WORKSPACE = Workspace()
CALLS_PER_DAMAGE = 4
SCALES = 8  # of the int8 graph that are doubled, for each kind
CALLS_PER_SCALE = 8  # over both trajectories


def main() -> None:
    reference = reference_run(WORKSPACE.reference)
    fp32 = torch_networks("fp32", "cpu", weights=WORKSPACE.weights)
    result: dict[str, Any] = {"precisions": {}, "damage": {}}
    for precision, networks in _precisions():
        row = result["precisions"][precision] = of_networks(networks, reference)
        print(
            precision,
            {name: row[name]["rel_l2"] for name in NAMES},
            short(row["run"]),
        )
    for kind, errors in damage_to_layers(fp32["unet"]).items():
        result["damage"][kind] = spread_of(errors)
        print(kind, {k: v for k, v in result["damage"][kind].items() if k != "all"})
    if (WORKSPACE.onnx("unet-int8") / MODEL).is_file():
        result["doubled_scales"] = damage_to_scales(fp32, reference)
    Path("docs/tolerances.json").write_text(json.dumps(result, indent=1) + "\n")


def _precisions() -> Iterator[tuple[str, Mapping[str, Network]]]:
    for precision in ("fp32", "fp16", "bf16"):
        yield precision, torch_networks(precision, "cpu", weights=WORKSPACE.weights)
    for precision in ("fp16-mixed", "int8", "fp8"):
        graphs = {name: WORKSPACE.onnx(f"{name}-{precision}") / MODEL for name in NAMES}
        if all(graph.is_file() for graph in graphs.values()):
            yield precision, {name: graph_network(graph) for name, graph in graphs.items()}


def of_networks(networks: Mapping[str, Network], reference: Run) -> dict[str, Any]:
    """Every component on the reference's inputs, then whole runs."""
    row: dict[str, Any] = {}
    for name in NAMES:
        calls = recorded_calls(WORKSPACE.reference / f"{name}.safetensors")
        found = component_differences(name, networks[name], calls, "cpu")
        row[name] = asdict(worst_of(found)) | {"per_call": [d.rel_l2 for d in found]}
    return row | {"run": of_run(networks, reference)}


def of_run(networks: Mapping[str, Network], reference: Run) -> dict[str, Any]:
    """The worst image of a run from the reference's noise, after every step and at its end."""
    run = run_from_noise(networks, WORKSPACE, "cpu")
    latents, images = latent_differences(run, reference), image_differences(run, reference)
    return {
        "rel_l2": [max(image[step].rel_l2 for image in latents) for step in range(len(latents[0]))],
        "cosine": [min(image[step].cosine for image in latents) for step in range(len(latents[0]))],
        **{key: min(image[key] for image in images) for key in ("psnr", "ssim")},
    }


def short(run: Mapping[str, Any]) -> dict[str, float]:
    return {
        "rel_l2": max(run["rel_l2"]),
        "cosine": min(run["cosine"]),
        "psnr": run["psnr"],
        "ssim": run["ssim"],
    }


def graph_network(path: Path) -> Network:
    """A graph in ONNX Runtime, as it is written, as a network."""
    session = session_of(path)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, feeds_of(session.get_inputs(), tensors))[0])

    return run


def spread_of(errors: list[float]) -> dict[str, Any]:
    return {
        "places": len(errors),
        "rel_l2_least": min(errors),
        "rel_l2_median": statistics.median(errors),
        "rel_l2_most": max(errors),
        "all": sorted(errors),
    }


def damage_to_layers(network: Network) -> dict[str, list[float]]:
    """The worst relative L2 of a few calls, of the UNet in PyTorch with one place damaged."""
    assert isinstance(network, TorchNetwork)
    steps = load_settings(WORKSPACE.reference)[0].steps
    recorded = recorded_calls(WORKSPACE.reference / "unet.safetensors")
    calls = spread(recorded[:steps], CALLS_PER_DAMAGE)  # of the first trajectory
    errors: dict[str, list[float]] = {}
    for kind, damages in _damages(network.module).items():
        for damage in damages:
            undo = damage()
            found = [difference(network(*inputs).float(), output) for inputs, (output,) in calls]
            errors.setdefault(kind, []).append(max(one.rel_l2 for one in found))
            undo()
    return errors


def damage_to_scales(fp32: Mapping[str, Network], reference: Run) -> list[dict[str, Any]]:
    """One scale of the int8 UNet doubled: fed the reference's inputs, and in runs of its own."""
    calls = spread(recorded_calls(WORKSPACE.reference / "unet.safetensors"), CALLS_PER_SCALE)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, scale, path in _doubled_scales(Path(folder)):
            network = graph_network(path)
            fed = [difference(network(*inputs).float(), output) for inputs, (output,) in calls]
            run = of_run({**fp32, "unet": network}, reference)
            rows.append({"kind": kind, "scale": scale, "fed": [d.rel_l2 for d in fed], **run})
            print(kind, scale, f"fed {max(d.rel_l2 for d in fed):.2e}", short(run), flush=True)
    return rows


def _doubled_scales(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """The int8 UNet as it is, then with one scale doubled: of a weight, or of an activation.

    An activation's scale is doubled for what reads it, not for what writes it.
    """
    path = WORKSPACE.onnx("unet-int8") / MODEL
    weights: list[int] = []
    activations: list[int] = []
    graph = onnx.load(path, load_external_data=False).graph
    initializers = {tensor.name for tensor in graph.initializer}
    for index, node in enumerate(graph.node):
        if node.op_type == "DequantizeLinear":
            (weights if node.input[0] in initializers else activations).append(index)
    places = [("weight", place) for place in spread(weights, SCALES)]
    places += [("activation", place) for place in spread(activations, SCALES)]
    yield "none", "", path
    for kind, place in places:
        model = onnx.load(path)
        reader = model.graph.node[place]
        (scale,) = (t for t in model.graph.initializer if t.name == reader.input[1])
        values = numpy_helper.to_array(scale)
        doubled = numpy_helper.from_array(values * values.dtype.type(2), f"{scale.name}.doubled")
        model.graph.initializer.append(doubled)
        reader.input[1] = doubled.name
        save_with_external_data(model, folder / MODEL)
        yield kind, scale.name, folder / MODEL


Damage = Callable[[], Callable[[], None]]


def _damages(unet: torch.nn.Module) -> dict[str, list[Damage]]:
    """Every layer's weights times 1.05; K and V of every attention swapped."""
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    attentions: list[Any] = [m for m in unet.modules() if hasattr(m, "to_k") and hasattr(m, "to_v")]
    swappable = [m for m in attentions if m.to_k.weight.shape == m.to_v.weight.shape]

    def scale(layer: torch.nn.Conv2d | torch.nn.Linear) -> Damage:
        def damage() -> Callable[[], None]:
            kept = layer.weight.detach().clone()
            layer.weight.data.mul_(1.05)

            def undo() -> None:
                layer.weight.data.copy_(kept)

            return undo

        return damage

    def swap(attention: Any) -> Damage:
        def damage() -> Callable[[], None]:
            def exchange() -> None:
                attention.to_k, attention.to_v = attention.to_v, attention.to_k

            exchange()
            return exchange

        return damage

    return {
        "weights of one layer × 1.05": [scale(layer) for layer in layers],
        "K and V of one attention swapped": [swap(attention) for attention in swappable],
    }


if __name__ == "__main__":
    main()
