"""What each precision, and each kind of damage, does to the model: the ground of conf/validate/.

`python tools/measure_tolerances.py` after `dvc repro reference`; writes docs/tolerances.json and
prints the tables of docs/tolerances.md. PyTorch computes in the precision itself, on the CPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusion_engines import layout
from diffusion_engines.components import COMPONENTS
from diffusion_engines.parity.metrics import Difference, difference, psnr, ssim
from diffusion_engines.runtime.assemble import TorchNetwork, torch_networks
from diffusion_engines.runtime.recording import load_settings, prompt_batches, recorded_calls
from diffusion_engines.runtime.sampling import load_model, sample

CALLS_PER_DAMAGE = 4


def main() -> None:
    result: dict[str, dict[str, object]] = {"precisions": {}, "damage": {}}
    for precision in ("fp32", "fp16", "bf16"):
        networks = torch_networks(precision, "cpu")
        row: dict[str, object] = {}
        for name in COMPONENTS:
            found = _differences(networks[name], name)
            row[name] = {
                "rel_l2": max(d.rel_l2 for d in found),
                "max_abs": max(d.max_abs for d in found),
                "cosine": min(d.cosine for d in found),
                "per_call": [d.rel_l2 for d in found],
            }
        row["images"] = _images(networks)
        result["precisions"][precision] = row
        print(precision, {k: v if k == "images" else v["rel_l2"] for k, v in row.items()})
    network = torch_networks("fp32", "cpu", names=["unet"])["unet"]
    for kind, damages in _damages(network.module).items():
        errors = []
        for damage in damages:
            undo = damage()
            errors.append(max(d.rel_l2 for d in _differences(network, "unet", CALLS_PER_DAMAGE)))
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


def _differences(network: TorchNetwork, name: str, at_most: int = 0) -> list[Difference]:
    calls = recorded_calls(layout.REFERENCE / f"{name}.safetensors")
    if at_most:  # spread over the first trajectory
        steps = len(calls) // 2
        calls = [calls[round(i * (steps - 1) / (at_most - 1))] for i in range(at_most)]
    return [difference(network(*inputs).float(), expected) for inputs, expected in calls]


def _images(networks: dict[str, TorchNetwork]) -> dict[str, float]:
    settings, prompts, seed, batch_size = load_settings(layout.REFERENCE)
    noise = load_file(layout.REFERENCE / "latents.safetensors")
    expected = load_file(layout.REFERENCE / "images.safetensors")["images"]
    model = load_model(layout.WEIGHTS)
    made = [
        sample(networks, model, settings, batch, noise[f"{i}.noise"]).images.float()
        for i, (batch, _) in enumerate(prompt_batches(prompts, seed, batch_size))
    ]
    pairs = [(a[None], b[None]) for a, b in zip(torch.cat(made), expected, strict=True)]
    return {"psnr": min(psnr(a, b) for a, b in pairs), "ssim": min(ssim(a, b) for a, b in pairs)}


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
