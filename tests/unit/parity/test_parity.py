"""Differences are measured right, and a broken engine misses its gate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffusion_engines.config import Gate, LatentsGate, params_from_config
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.parity.distances import Difference, worst_of
from diffusion_engines.parity.gates import (
    gate_of,
    misses_of,
    misses_of_component,
    misses_of_latents,
    within,
)
from diffusion_engines.parity.metrics import difference, psnr, ssim
from diffusion_engines.parity.results import GraphParity
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import ROOT, load

NAN = float("nan")


def test_distances_are_those_computed_by_hand() -> None:
    found = difference(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
    assert found.rel_l2 == pytest.approx(1 / 5)
    assert found.max_abs == pytest.approx(1)
    assert found.cosine == pytest.approx(29 / (math.sqrt(34) * 5))
    assert found.not_finite == 0
    with pytest.raises(ValueError, match="shapes differ"):
        difference(torch.ones(2), torch.ones(3))


def test_nan_is_never_close() -> None:
    found = difference(torch.tensor([1.0, NAN]), torch.ones(2))
    assert (found.not_finite, found.rel_l2) == (1, math.inf)
    assert misses_of_component("unet", Gate(1.0, 1.0, 0.1), [found]) == [
        "unet, call 0: 1 values are NaN or infinite"
    ]
    black = torch.full((1, 3, 16, 16), NAN)
    assert psnr(black, torch.zeros(1, 3, 16, 16)) == 0
    assert ssim(black, torch.zeros(1, 3, 16, 16)) == 0


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_reference_that_is_not_finite_is_no_reference(value: float) -> None:
    broken = torch.tensor([1.0, value])
    with pytest.raises(IntegrityError, match="the reference has NaN or infinite values") as raised:
        difference(torch.ones(2), broken)
    assert "1 of 2 values" in str(raised.value)
    image = torch.full((1, 3, 16, 16), value)
    for metric in (psnr, ssim):
        with pytest.raises(IntegrityError, match="the reference has NaN"):
            metric(torch.zeros(1, 3, 16, 16), image)


@pytest.mark.parametrize(
    ("metric", "found", "tolerance", "passed"),
    [
        ("rel_l2", 0.1, 0.1, True),  # at the tolerance is within it
        ("rel_l2", 0.11, 0.1, False),
        ("rel_l2", NAN, 0.1, False),
        ("rel_l2", -math.inf, 0.1, False),
        ("max_abs", math.inf, 0.1, False),
        ("cosine", 0.9, 0.9, True),
        ("cosine", 0.89, 0.9, False),
        ("cosine", NAN, 0.9, False),
        ("psnr", math.inf, 30.0, False),
        ("psnr", NAN, 30.0, False),
        ("ssim", 0.91, 0.9, True),
    ],
)
def test_within_tolerance(metric: str, found: float, tolerance: float, passed: bool) -> None:
    assert within(metric, found, tolerance) is passed
    missed = misses_of("x", {metric: tolerance}, {metric: found})
    assert len(missed) == (0 if passed else 1)


def test_nan_distances_are_a_miss_everywhere() -> None:
    broken = Difference(NAN, NAN, NAN, 0)
    assert misses_of_component("unet", Gate(1.0, 1.0, 0.1), [broken]) == [
        f"unet, call 0: {metric} is NaN" for metric in ("rel_l2", "max_abs", "cosine")
    ]
    assert misses_of_latents(LatentsGate(1.0, 0.1), [[broken]]) == [
        "latents of image 0, step 1 of 1: rel_l2 is NaN"
    ]
    assert GraphParity((broken,), (broken,)).misses(1.0) == ["call 0: rel_l2 is NaN"]


@pytest.mark.parametrize("order", [1, -1])
def test_the_worst_of_differences_keeps_nan_in_any_order(order: int) -> None:
    found = [Difference(0.1, 0.2, 0.9, 0), Difference(NAN, NAN, NAN, 1)][::order]
    worst = worst_of(found)
    assert all(math.isnan(value) for value in (worst.rel_l2, worst.max_abs, worst.cosine))
    assert worst.not_finite == 1
    assert worst_of([Difference(0.1, 0.2, 0.9, 0), Difference(0.3, 0.1, 0.8, 2)]) == Difference(
        0.3, 0.2, 0.8, 2
    )


def test_images_are_compared_in_decibels() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.8
    assert psnr(image, image) == 100
    assert psnr(image + 0.1, image) == pytest.approx(20, abs=1e-3)
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image.flip(3), image) < 0.5


def test_all_misses_are_collected() -> None:
    bad = difference(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]))
    good = difference(torch.ones(2), torch.ones(2))
    misses = misses_of_component("unet", Gate(0.1, 0.1, 0.9), [good, bad])
    assert [miss.split(": ")[1].split()[0] for miss in misses] == ["rel_l2", "max_abs", "cosine"]
    assert all("call 1" in miss for miss in misses)
    assert misses_of("image 1", {"psnr": 30.0, "ssim": 0.9}, {"psnr": 20.0, "ssim": 0.5}) == [
        "image 1: PSNR 20.0 dB < 30.0 dB",
        "image 1: SSIM 0.5000 < 0.9000",
    ]


def test_latents_miss_at_the_first_step_that_is_off() -> None:
    reference = torch.ones(8)
    steps = [difference(reference * (1 + error), reference) for error in (0.0, 0.01, 0.3, 0.4)]
    assert misses_of_latents(LatentsGate(0.5, 0.9), [steps]) == []
    assert misses_of_latents(LatentsGate(0.1, 0.9), [steps[:2], steps]) == [
        "latents of image 1, step 3 of 4: rel_l2 3.00e-01 > 1.00e-01"
    ]
    turned = reference.clone()
    turned[0] = -1
    (miss,) = misses_of_latents(LatentsGate(2.0, 0.9), [[difference(turned, reference)]])
    assert "cosine 0.7500000 < 0.9" in miss
    (miss,) = misses_of_latents(
        LatentsGate(2.0, 0.1), [[difference(torch.full((8,), NAN), reference)]]
    )
    assert "8 values are NaN or infinite" in miss


def test_a_missing_tolerance_is_named() -> None:
    params = params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert gate_of(params["validate"], "unet", "fp32").rel_l2 == 1e-4
    with pytest.raises(ConfigError, match=r"validate\.components\.unet\.int4"):
        gate_of(params["validate"], "unet", "int4")


def scaled(module: Any) -> None:
    module.network.mid_block.resnets[0].conv1.weight.mul_(1.05)


def swapped(module: Any) -> None:
    attention = module.network.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k, attention.to_v = attention.to_v, attention.to_k


@pytest.mark.parametrize("damage", [scaled, swapped])
def test_a_damaged_network_misses_the_default_gate(tiny_weights: Path, damage) -> None:
    params = params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))
    gate = gate_of(params["validate"], "unet", "fp32")
    loaded = load(tiny_weights, "unet")
    inputs = example_inputs(loaded.inputs, "fp32")
    with torch.no_grad():
        expected = loaded.module(*inputs)
        assert not misses_of_component("unet", gate, [difference(expected, expected)])
        damage(loaded.module)
        found = difference(loaded.module(*inputs), expected)
    assert misses_of_component("unet", gate, [found])
