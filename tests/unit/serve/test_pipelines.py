"""A served pipeline's loop is on the device where nothing looks into it, else diffusers' own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler

from diffusion_engines import load_pipeline
from diffusion_engines.config import Dynamic
from diffusion_engines.errors import ShapeError
from diffusion_engines.families import FAMILIES
from diffusion_engines.families.base import Family
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.runtime.denoising import _captures, denoise
from diffusion_engines.runtime.sampling import make_scheduler
from diffusion_engines.serve import pipelines
from diffusion_engines.serve.adapters import UNet
from diffusion_engines.serve.pipelines import engine_pipeline_class
from tests.conftest import write_bundles
from tests.tiers import long

PROMPT = "A big banana leaf with lemons in front of it"


@pytest.fixture(scope="module")
def loaded(tiny_bundles: Path) -> Any:
    pipeline: Any = load_pipeline(tiny_bundles, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def served(loaded: Any) -> Iterator[Any]:
    """A pipeline whose scheduler may be replaced."""
    before = loaded.scheduler
    yield loaded
    loaded.scheduler = before


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs of the loop on the device."""
    made: list[Any] = []
    own = denoise

    def watched(*args: Any, **options: Any) -> Any:
        made.append(own(*args, **options))
        return made[-1]

    monkeypatch.setattr(pipelines, "denoise", watched)
    return made


def paint(call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    defaults = {
        "num_inference_steps": 4,
        "negative_prompt": "blurry",
        "output_type": "np",
        "generator": torch.Generator().manual_seed(7),
    }
    return call(*(args or (PROMPT,)), **{**defaults, **settings})


def by_diffusers(pipeline: Any, *args: Any, **settings: Any) -> Any:
    """The picture of diffusers' own call, with the same engines."""
    return paint(functools.partial(StableDiffusionPipeline.__call__, pipeline), *args, **settings)


def test_it_is_diffusers_pipeline(served: Any) -> None:
    assert isinstance(served, StableDiffusionPipeline)
    assert type(served).__name__ == "StableDiffusionPipeline"
    assert repr(served).startswith("StableDiffusionPipeline {")
    arguments = (StableDiffusionPipeline, "unet", FAMILY.around_loop)
    assert engine_pipeline_class(*arguments) is type(served)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_names_arguments_that_its_pipeline_has(family: Family) -> None:
    base = getattr(diffusers, family.class_name)
    assert family.around_loop <= inspect.signature(base.__call__).parameters.keys()


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", FAMILY.schedulers)
def test_the_pictures_are_those_of_diffusers_loop(
    served: Any, runs: list[Any], name: str, prediction: str, scale: float
) -> None:
    config = {**served.scheduler.config, "prediction_type": prediction}
    served.scheduler = make_scheduler(FAMILY, name, config)
    generators = [torch.Generator().manual_seed(7) for _ in range(3)]
    found = paint(served, guidance_scale=scale, generator=generators[0]).images
    assert len(runs) == 1
    expected = by_diffusers(served, guidance_scale=scale, generator=generators[1]).images
    assert len(runs) == 1
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # Code that goes on drawing from a generator draws the same, too.
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    listed = paint(served, guidance_scale=scale, generator=generators[2:]).images
    np.testing.assert_array_equal(listed, found)


@pytest.mark.parametrize(
    "settings",
    [
        {"callback_on_step_end": lambda pipeline, index, timestep, tensors: tensors},
        {"eta": 0.5},
        {"guidance_rescale": 0.7},
        {"latents": torch.zeros(1, 4, 16, 16, dtype=torch.float64)},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_looks_into_the_loop_is_left_to_diffusers(
    served: Any, runs: list[Any], settings: dict[str, Any]
) -> None:
    served.scheduler = DDIMScheduler.from_config(served.scheduler.config)
    found = paint(served, **settings).images
    assert runs == []
    np.testing.assert_array_equal(found, by_diffusers(served, **settings).images)
    neutral = {"eta": 0, "guidance_rescale": 0.0, "callback_on_step_end": None, "clip_skip": None}
    paint(served, **neutral)
    assert len(runs) == 1


def test_chosen_timesteps_are_left_to_diffusers(served: Any, runs: list[Any]) -> None:
    served.scheduler = make_scheduler(FAMILY, "euler", served.scheduler.config)
    found = paint(served, timesteps=[900, 500, 100]).images
    assert runs == []
    np.testing.assert_array_equal(found, by_diffusers(served, timesteps=[900, 500, 100]).images)


@pytest.mark.parametrize("changes", [{"clip_sample": True}, {"thresholding": True}])
def test_a_scheduler_that_clips_is_left_to_diffusers(
    served: Any, runs: list[Any], changes: dict[str, bool]
) -> None:
    served.scheduler = DDIMScheduler.from_config(served.scheduler.config, **changes)
    found = paint(served).images
    assert runs == []
    np.testing.assert_array_equal(found, by_diffusers(served).images)
    served.scheduler = UniPCMultistepScheduler.from_config(served.scheduler.config)
    paint(served, num_inference_steps=20)
    assert runs == []


def test_a_callback_is_called_at_every_step(served: Any, runs: list[Any]) -> None:
    seen = []

    def callback(pipeline: Any, index: int, timestep: Any, tensors: Any) -> Any:
        seen.append((index, tuple(tensors["latents"].shape)))
        return tensors

    expected = paint(served).images
    assert len(runs) == 1
    found = paint(served, callback_on_step_end=callback).images
    count = len(served.scheduler.timesteps)
    assert seen == [(index, (1, 4, 16, 16)) for index in range(count)]
    assert len(runs) == 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_inputs_and_results_have_the_forms_that_diffusers_knows(
    served: Any, runs: list[Any]
) -> None:
    latents = torch.randn(1, 4, 16, 16)
    embeds = served.encode_prompt(PROMPT, "cpu", 1, True, "blurry")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {"latents": latents}),
        ((PROMPT, 128, 128), {}),
        ((None,), {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}),
        ((), {"output_type": "pt"}),
        ((), {"output_type": "pil"}),
        ((), {"output_type": "latent"}),
    ]
    for args, settings in calls:
        if "prompt_embeds" in settings:
            settings["negative_prompt"] = None
        before = latents.clone()
        found = paint(served, *args, **settings).images
        expected = by_diffusers(served, *args, **settings).images
        assert type(found) is type(expected)
        first, second = (np.asarray(value[0], dtype=np.float32) for value in (found, expected))
        tolerance = 1 if settings.get("output_type") == "pil" else 1e-4
        np.testing.assert_allclose(first, second, rtol=0, atol=tolerance)
        assert torch.equal(latents, before)
    assert len(runs) == len(calls)
    images, flags = paint(served, return_dict=False)
    assert images.shape == (1, 128, 128, 3)
    assert flags is None


@long
def test_several_images_per_prompt_have_generators_of_their_own(
    tiny_weights: Path, tmp_path: Path, runs: list[Any]
) -> None:
    bounds = Dynamic(batch_size=[1, 2], height=[64, 128], width=[64, 128])
    write_bundles(tiny_weights, tmp_path / "cpu", bounds)
    pipeline: Any = load_pipeline(tmp_path / "cpu")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(FAMILY, "euler_ancestral", pipeline.scheduler.config)

    def settings() -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
        return {"num_images_per_prompt": 2, "generator": generators, "height": 64, "width": 128}

    found = paint(pipeline, **settings()).images
    assert found.shape == (2, 64, 128, 3)
    np.testing.assert_allclose(
        found, by_diffusers(pipeline, **settings()).images, rtol=0, atol=1e-4
    )
    assert len(runs) == 1
    torch.manual_seed(4)
    found = paint(pipeline, generator=None).images
    torch.manual_seed(4)
    expected = by_diffusers(pipeline, generator=None).images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "pndm"])
def test_a_call_leaves_behind_what_diffusers_call_leaves(
    served: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    served.scheduler = make_scheduler(FAMILY, name, served.scheduler.config)
    scheduler, unet = served.scheduler, served.unet
    moved = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self) -> None:
            moved.append(self.total)

    monkeypatch.setattr(type(served), "progress_bar", lambda self, total: Bar(total))
    left = []
    for call in (paint, by_diffusers):
        moved.clear()
        call(served, guidance_scale=3.0)
        names = vars(served).keys()
        left.append((served.num_timesteps, served.guidance_scale, [*moved], sorted(names)))
        assert served.scheduler is scheduler
        assert served.unet is unet
    assert left[0] == left[1]
    assert moved == [4] * 4


def test_the_sizes_of_a_call_are_those_of_the_engine_unless_it_has_others(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.unet, "usual", (8, 24))  # no square, which sample_size cannot say
    with pytest.raises(ShapeError, match=r"latents of shape \(2, 4, 8, 24\)"):
        paint(served)
    assert paint(served, height=128, width=128).images.shape == (1, 128, 128, 3)


def test_a_run_can_be_interrupted(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = type(served.unet).noise

    def noise(self: Any, *args: Any) -> Any:
        calls.append(args)
        served._interrupt = len(calls) == 2  # as another thread would
        return own(self, *args)

    monkeypatch.setattr(type(served.unet), "noise", noise)
    assert paint(served).images.shape == (1, 128, 128, 3)
    assert len(calls) == 2
    paint(served)
    assert len(calls) > 4


def test_wrong_calls_are_refused_as_ever(served: Any) -> None:
    with pytest.raises(TypeError, match="multiple values"):
        served(PROMPT, prompt=PROMPT)
    with pytest.raises(ValueError, match="divisible by 8"):
        paint(served, height=100, width=128)
    with pytest.raises(ShapeError, match="batch 2"):
        paint(served, num_images_per_prompt=2)
    assert isinstance(served.unet, UNet)


def test_an_engine_says_through_its_wrapping_whether_a_graph_can_hold_it(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    engine = served.unet.engine
    assert not _captures(served.unet, gpu)
    monkeypatch.setattr(type(engine.engine), "capturable", True, raising=False)
    assert _captures(engine, gpu)
    assert _captures(served.unet, gpu)
    assert not _captures(served.unet, torch.device("cpu"))
