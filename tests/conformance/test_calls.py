"""What code that uses diffusers asks of a pipeline, engines answer as diffusers does, or refuse.

`docs/conformance.md` has the same table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffusion_engines import load_pipeline, manifests
from diffusion_engines.errors import DiffusionEnginesError
from diffusion_engines.files import write_json
from diffusion_engines.manifests import Weights
from tests.conformance.calls import EQUAL, REFUSED, SD, SDXL, Call, paint
from tests.conftest import ROOT, write_bundles
from tests.models import small_image, write_reduced_weights
from tests.shared import made_once
from tests.tiers import long

# Of pictures in [0, 1], and of latents and embeddings, whose size is about 1 to 10.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """A pipeline of diffusers, and one of engines of the same weights."""

    own: Any
    served: Any


Pairs = Callable[[str], Pair]


@pytest.fixture(scope="module")
def pairs(
    tiny_weights: Path, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pairs:
    made: dict[str, Pair] = {}

    def write_sdxl(folder: Path) -> None:
        weights = write_reduced_weights("sdxl", folder)
        # Both pipelines paint squares of 128 pixels of themselves.
        config = weights / "unet/config.json"
        write_json(config, json.loads(config.read_text()) | {"sample_size": 16})
        manifests.write(weights / "unet", manifests.read(weights / "unet", Weights, verify=False))
        write_bundles(weights, folder / "bundles/cpu", image=small_image("sdxl"))

    def pair(name: str) -> Pair:
        if name not in made:
            weights, bundles = tiny_weights, tiny_bundles
            if name == SDXL:
                folder = made_once(tmp_path_factory, "sdxl", write_sdxl)
                weights, bundles = folder / "weights", folder / "bundles/cpu"
            cls = getattr(diffusers, name)
            options = {"safety_checker": None} if name == SD else {"add_watermarker": False}
            # One thread: those of ONNX Runtime spin while they wait, and others test beside.
            served = load_pipeline(bundles, threads=1)
            made[name] = Pair(cls.from_pretrained(weights, **options), served)
            for pipeline in (made[name].own, made[name].served):
                pipeline.set_progress_bar_config(disable=True)
        return made[name]

    return pair


@pytest.fixture
def pair(pairs: Pairs, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A pair whose schedulers may be replaced."""
    found = pairs(request.param)
    before = [(pipeline, pipeline.scheduler) for pipeline in (found.own, found.served)]
    yield found
    for pipeline, scheduler in before:
        pipeline.scheduler = scheduler


def cases(calls: list[Call]) -> list[Any]:
    """Each call with each of its pipelines; what takes SDXL's engines is long."""
    return [
        pytest.param(
            name, call, id=f"{name}-{call.name}", marks=[] if call.quick and name == SD else [long]
        )
        for name in (SD, SDXL)
        for call in calls
        if name in call.only
    ]


def numbers(result: Any) -> np.ndarray:
    """Return what a call gave as numbers, pictures between 0 and 1."""
    if isinstance(result, torch.Tensor):
        return result.detach().float().numpy()
    if isinstance(result, list):
        return np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in result])
    return np.asarray(result)


# What diffusers' schedulers of KDPM2 and LMS do with NumPy.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize(("pair", "call"), cases(EQUAL), indirect=["pair"])
def test_engines_give_what_diffusers_gives(pair: Pair, call: Call) -> None:
    expected, found = (numbers(call.run(pipeline)) for pipeline in (pair.own, pair.served))
    assert found.shape == expected.shape
    assert expected.size < 9 or expected.std() > 1e-3  # something is there to compare
    # A picture in 8 bits may round the other way.
    atol = 1.01 / 255 if "pil" in call.name else TOLERANCE
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=atol)


@pytest.mark.parametrize(("pair", "call"), cases(REFUSED), indirect=["pair"])
def test_engines_refuse_what_they_cannot_do(
    pair: Pair, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiffusionEnginesError, match=call.refused) as raised:
        call.run(pair.served)
    assert "  fix: " in str(raised.value) or "timestep" in call.name
    assert not list(tmp_path.iterdir())  # nothing half written
    goes_on = paint(pair.served, num_inference_steps=1, output_type="latent")
    assert goes_on.std() > 1e-3


@long
@pytest.mark.parametrize("pair", [SD], indirect=True)
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_a_network_of_diffusers_takes_an_engines_place(pair: Pair, name: str) -> None:
    expected = numbers(EQUAL[0].run(pair.own))
    engine = getattr(pair.served, name)
    setattr(pair.served, name, getattr(pair.own, name))
    try:
        found = numbers(EQUAL[0].run(pair.served))
    finally:
        setattr(pair.served, name, engine)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_the_page_has_every_call_and_its_answer() -> None:
    text = (ROOT / "docs/conformance.md").read_text()
    rows = re.findall(r"^\| (.+) \| (\w*) \| (\w*) \|$", text, re.MULTILINE)
    expected = [
        (call.name, *(answer if name in call.only else "" for name in (SD, SDXL)))
        for answer, calls in (("equal", EQUAL), ("refused", REFUSED))
        for call in calls
    ]
    assert rows == expected
    equal, equal_xl, refused, refused_xl = (
        sum(row[column] == answer for row in rows)
        for answer in ("equal", "refused")
        for column in (1, 2)
    )
    assert (
        f"{equal} calls of Stable Diffusion and {equal_xl} of SDXL are equal, {refused} and "
        f"{refused_xl} are refused." in text
    )
