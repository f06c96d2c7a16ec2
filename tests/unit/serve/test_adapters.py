"""Engines in the shape of diffusers' networks: fp32 comes out, what does not fit is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import pytest
import torch

from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.families.stable_diffusion_xl import FAMILY as SDXL
from diffusion_engines.runtime.shapes import CheckedEngine
from diffusion_engines.serve.adapters import PenultimateTextEncoder, UNet
from tests.conftest import COMPONENTS, IMAGE, STATIC
from tests.manifests import engine_manifest, graph_manifest

ARCHITECTURE = {"in_channels": 4, "cross_attention_dim": 32, "block_out_channels": [1, 2]}


class Half(torch.nn.Module):
    """Computes in fp16, as an engine may, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        self.calls.append(tensors)
        return (2 * tensors[0]).half()


def make(device: Literal["cpu", "cuda"] = "cuda") -> tuple[UNet, Half]:
    target = OnnxRuntimeTarget("onnxruntime", device, OnnxRuntimeBuild("all", tf32=False))
    inputs = COMPONENTS["unet"].inputs(ARCHITECTURE, IMAGE, STATIC)
    graph = graph_manifest("unet", "fp16", inputs)
    manifest = engine_manifest("gpu-unet", graph, settings=asdict(target))
    engine = Half()
    return UNet(CheckedEngine(engine, manifest), ARCHITECTURE), engine


def call(unet: UNet, rows: int = 2, timestep: Any = 999, **others: Any) -> Any:
    return unet(torch.ones(rows, 4, 16, 16), timestep, torch.ones(rows, 77, 32), **others)


def test_what_leaves_is_fp32_as_a_tuple_or_by_name() -> None:
    unet, _ = make()
    assert unet.dtype == torch.float32
    assert call(unet).sample.dtype == torch.float32
    (noise,) = call(unet, return_dict=False)
    assert torch.equal(noise, torch.full((2, 4, 16, 16), 2.0))


def test_the_size_of_a_pipeline_is_that_of_its_engine() -> None:
    unet, _ = make()
    assert unet.config.sample_size == 16
    assert unet.config.in_channels == 4


def test_without_guidance_the_one_half_runs_as_both() -> None:
    unet, engine = make()
    assert call(unet, rows=1).sample.shape == (1, 4, 16, 16)
    latents, _, text = engine.calls[0]
    assert (len(latents), len(text)) == (2, 2)


def test_a_timestep_is_fp32_and_one() -> None:
    unet, engine = make()
    for timestep in (999, torch.tensor(999), torch.tensor([999, 999])):
        call(unet, timestep=timestep)
        found = engine.calls[-1][1]
        assert (found.tolist(), found.dtype) == ([999.0], torch.float32)
    with pytest.raises(ConfigError, match="one timestep per call"):
        call(unet, timestep=torch.tensor([999, 1]))


def test_conditions_without_an_input_are_refused() -> None:
    unet, _ = make()
    call(unet, added_cond_kwargs=None)
    with pytest.raises(ConfigError, match="no input for added_cond_kwargs"):
        call(unet, added_cond_kwargs={"text_embeds": torch.ones(1)})


def test_a_gpu_engine_is_where_it_is() -> None:
    unet, _ = make()
    assert unet.device == torch.device("cuda")
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        assert unet.to(device, torch.float16) is unet
    for device in ("cpu", "cuda:1"):
        with pytest.raises(HardwareError, match="cannot be moved"):
            unet.to(device)
    with pytest.raises(HardwareError, match="cannot change its precision"):
        unet.to(torch.bfloat16)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_text_encoder_of_sdxl_gives_no_state_for_another(pooled: bool) -> None:
    class Encodes(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> Any:
            hidden = torch.ones(*ids.shape, 8)
            return (hidden, torch.zeros(len(ids), 5)) if pooled else hidden

    name = "text_encoder_2" if pooled else "text_encoder"
    inputs = SDXL.component(name).inputs({}, IMAGE, STATIC)
    target = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
    graph = graph_manifest(name, "fp32", inputs)
    manifest = engine_manifest(f"cpu-{name}", graph, settings=asdict(target))
    found = PenultimateTextEncoder(CheckedEngine(Encodes(), manifest), {})(
        torch.zeros(1, 77, dtype=torch.int64)
    )
    assert found.hidden_states[-2].shape == (1, 77, 8)
    if pooled:
        assert found[0].shape == (1, 5)
        return
    # By this the pipeline knows that it is no pooled embedding; it is the last hidden state.
    assert found[0].ndim == 3
    for use in (
        lambda: found[0].shape,
        lambda: found[0] + 1,
        lambda: found[0][0],
        lambda: torch.cat([found[0]]),
        lambda: torch.zeros_like(found[0]),
    ):
        with pytest.raises(ConfigError, match="penultimate hidden state alone"):
            use()
