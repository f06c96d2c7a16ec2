"""What each precision, and each kind of damage, does to the model: the ground of conf/validate/.

`python tools/measure_tolerances.py` after `dvc repro reference`; writes docs/tolerances.json and
prints what docs/tolerances.md tells of them. PyTorch computes in the precision itself, on the CPU.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from diffusion_engines import layout
from diffusion_engines.components import pipeline_of
from diffusion_engines.parity.metrics import difference
from diffusion_engines.parity.validation import compare_images, component_differences, worst_of
from diffusion_engines.runtime.assemble import torch_networks
from diffusion_engines.runtime.recording import load_settings, recorded_calls, spread

CALLS_PER_DAMAGE = 4


def main() -> None:
    result: dict[str, dict[str, object]] = {"precisions": {}, "damage": {}}
    for precision in ("fp32", "fp16", "bf16"):
        networks = torch_networks(precision, "cpu")
        row: dict[str, object] = {}
        for name in pipeline_of(layout.WEIGHTS).components:
            found = component_differences(name, networks[name], "cpu")
            row[name] = worst_of(found) | {"per_call": [d.rel_l2 for d in found]}
        with tempfile.TemporaryDirectory() as folder:
            images = compare_images(networks, Path(folder), "cpu")
        row["images"] = {key: min(image[key] for image in images) for key in ("psnr", "ssim")}
        result["precisions"][precision] = row
        print(precision, {k: v if k == "images" else v["rel_l2"] for k, v in row.items()})
    network = torch_networks("fp32", "cpu", names=["unet"])["unet"]
    steps = load_settings(layout.REFERENCE)[0].steps
    recorded = recorded_calls(layout.REFERENCE / "unet.safetensors")
    calls = spread(recorded[:steps], CALLS_PER_DAMAGE)  # of the first trajectory
    for kind, damages in _damages(network.module).items():
        errors = []
        for damage in damages:
            undo = damage()
            errors.append(
                max(
                    difference(network(*inputs).float(), noise).rel_l2 for inputs, (noise,) in calls
                )
            )
            undo()
        result["damage"][kind] = {
            "places": len(errors),
            "rel_l2_least": min(errors),
            "rel_l2_median": statistics.median(errors),
            "rel_l2_most": max(errors),
            "all": sorted(errors),
        }
        print(kind, {k: v for k, v in result["damage"][kind].items() if k != "all"})
    Path("docs/tolerances.json").write_text(json.dumps(result, indent=1) + "\n")


Damage = Callable[[], Callable[[], None]]


def _damages(unet: torch.nn.Module) -> dict[str, list[Damage]]:
    """Every layer's weights times 1.05; K and V of every attention swapped."""
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    attentions = [m for m in unet.modules() if hasattr(m, "to_k") and hasattr(m, "to_v")]
    swappable = [m for m in attentions if m.to_k.weight.shape == m.to_v.weight.shape]

    def scale(layer: torch.nn.Module) -> Damage:
        def damage() -> Callable[[], None]:
            kept = layer.weight.detach().clone()
            layer.weight.data.mul_(1.05)
            return lambda: layer.weight.data.copy_(kept)

        return damage

    def swap(attention: torch.nn.Module) -> Damage:
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
