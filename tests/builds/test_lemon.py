"""The model that the repository ships: its size, its words, its pictures, and what damage does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper

from diffusion_engines import manifests
from diffusion_engines.backends import backend
from diffusion_engines.backends.onnxruntime.settings import OnnxRuntimeBuild, OnnxRuntimeTarget
from diffusion_engines.config import (
    Image,
    params_from_config,
)
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.graph import MODEL, save_with_external_data
from diffusion_engines.onnx.quantize import lower_precision
from diffusion_engines.onnx.simplify import simplify_graph
from diffusion_engines.parity.gates import gate_of, misses_of_component
from diffusion_engines.parity.graphs import compare_graphs
from diffusion_engines.parity.metrics import difference
from diffusion_engines.runtime import sampling
from diffusion_engines.runtime.assemble import TorchNetwork
from diffusion_engines.runtime.bundle import load_bundle, wrap_engine
from diffusion_engines.runtime.calls import Recorder
from diffusion_engines.weights.fuse import fuse_loras
from diffusion_engines.weights.lora import read_lora
from tests.conftest import ROOT, graph_of, load
from tests.manifests import built_manifest, graph_manifest
from tests.tiers import long

LEMON = ROOT / "models" / "lemon"
PROMPT = "A big banana leaf with lemons in front of it"
IMAGE = Image(height=128, width=128, batch_size=1, vae_scale_factor=4)
SETTINGS = sampling.Settings("dpmpp_2m", 10, 7.5, 128, 128, vae_scale_factor=4)


def networks(weights: Path = LEMON) -> dict[str, TorchNetwork]:
    names = ("text_encoder", "unet", "vae_decoder")
    return {
        name: TorchNetwork(
            (loaded := load(weights, name)).module,
            [value.dtype for value in loaded.inputs],
            torch.float32,
        )
        for name in names
    }


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, Recorder]:
    """The picture of the prompt, (3, 128, 128), and the calls of the UNet that made it."""
    loaded: dict[str, Any] = dict(networks())
    recorder = Recorder(loaded["unet"])
    loaded["unet"] = recorder
    model = sampling.load_model(LEMON)
    noise = sampling.initial_latents(model, SETTINGS, [42])
    result = sampling.sample(loaded, model, SETTINGS, [PROMPT], noise)
    return result.images[0], recorder


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LEMON / "training"))
    import scenes as module

    return module


def test_it_fits_into_git() -> None:
    files = [path for path in LEMON.rglob("*") if path.is_file() and "__pycache__" not in str(path)]
    assert sum(path.stat().st_size for path in files) <= 16_000_000


def test_its_tokenizer_knows_the_words_of_its_captions(scenes: ModuleType) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(LEMON / "tokenizer")
    config = json.loads((LEMON / "text_encoder" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    random = Random(0)
    for _ in range(200):
        caption = scenes.caption_from_scene(scenes.random_scene(random, held_out=False), random)
        ids = tokenizer(caption).input_ids
        assert (ids[0], ids[-1]) == (config["bos_token_id"], config["eos_token_id"])
        words = caption.lower().replace(",", " ,").replace(".", " .").split()
        assert len(ids) == len(words) + 2, caption


def test_held_out_combinations_are_in_no_training_caption(scenes: ModuleType) -> None:
    def combinations(held_out: bool, count: int) -> set[tuple[object, ...]]:
        random = Random(1)
        made = [scenes.random_scene(random, held_out=held_out) for _ in range(count)]
        return {(s.kind, s.colour, s.count, s.anchor, s.relation) for s in made}

    trained, held_out = combinations(False, 4000), combinations(True, 200)
    assert len(held_out) > 30
    assert not trained & held_out


def test_a_drawing_shows_what_its_scene_says(scenes: ModuleType) -> None:
    import drawing

    base: dict[str, Any] = {"kind": "apple", "anchor": "none", "relation": "none", "size": "medium"}
    base |= {"surface": "plain", "wall": "white", "bowl": "white", "seed": 3}
    red = [drawing.draw(scenes.Scene(colour="red", count=n, **base)) for n in (1, 2, 3)]
    blue = drawing.draw(scenes.Scene(colour="blue", count=1, **base))
    areas = [int(((p[..., 0] > 150) & (p[..., 1] < 90)).sum()) for p in red]
    assert 0 < areas[0] < areas[1] < areas[2]
    assert ((blue[..., 2] > 120) & (blue[..., 0] < 90)).sum() > 200
    assert (drawing.draw(scenes.Scene(colour="red", count=1, **base)) == red[0]).all()


def test_it_draws_lemons_in_front_of_a_leaf(drawn: tuple[torch.Tensor, Recorder]) -> None:
    red, green, blue = drawn[0]
    yellow = (red > 0.7) & (green > 0.6) & (blue < 0.35)
    leaf = (green > red + 0.1) & (green > blue + 0.1) & (green > 0.25)
    rows = torch.arange(128.0)[:, None].expand(128, 128)
    assert 150 < yellow.sum() < 4000
    assert 500 < leaf.sum() < 6000
    assert rows[yellow].mean() > rows[leaf].mean() + 10, "the lemons lie at the foot of the leaf"


def test_its_lora_draws_the_same_in_blue_ink(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LEMON, tmp_path / "weights"))
    model = sampling.load_model(folder)
    unet = model.configs["unet"]
    lora = read_lora(ROOT / "loras", "ink.safetensors", 1.0, model.family, unet)
    fuse_loras([lora], folder)
    noise = sampling.initial_latents(model, SETTINGS, [42])
    red, _, blue = sampling.sample(networks(folder), model, SETTINGS, [PROMPT], noise).images[0]
    # Blue all over, and the leaf, dark, where it was.
    assert ((blue > red - 0.05).float().mean()) > 0.98
    assert red[10:90, 50:80].mean() < red[10:90, :30].mean() - 0.1


Damage = Callable[[dict[str, onnx.TensorProto]], None]


def scaled(layer: str) -> Damage:
    def damage(weights: dict[str, onnx.TensorProto]) -> None:
        tensor = weights[f"network.{layer}.weight"]
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values * values.dtype.type(1.05), tensor.name))

    return damage


def swapped(weights: dict[str, onnx.TensorProto]) -> None:
    unet = load(LEMON, "unet").module.network
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    # The exporter stores them transposed, under names of its own.
    k, v = (
        next(t for t in weights.values() if t.raw_data == layer.weight.T.numpy().tobytes())
        for layer in (attention.to_k, attention.to_v)
    )
    k.raw_data, v.raw_data = v.raw_data, k.raw_data


@pytest.fixture(scope="module")
def unet_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load(LEMON, "unet", image=IMAGE)
    folder = tmp_path_factory.mktemp("unet")
    export_module(
        loaded.module,
        loaded.inputs,
        folder,
        precision="fp32",
        exporter="dynamo",
        opset=18,
        patches=[],
        vocabulary=0,
    )
    return folder / MODEL


def engine_of(graph: Path, folder: Path, damage: Damage | None) -> torch.nn.Module:
    """Build, wrap and load the engine of a graph, damaged before or whole."""
    model = onnx.load(graph)
    if damage is not None:
        damage({tensor.name: tensor for tensor in model.graph.initializer})
    for name in ("graph", "engine", "bundle"):
        (folder / name).mkdir()
    save_with_external_data(model, folder / "graph" / MODEL)
    target = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
    module = backend("onnxruntime")
    specs = load(LEMON, "unet", image=IMAGE).inputs
    result = module.build(graph_of(folder / "graph" / MODEL, specs), folder / "engine", target)
    made = graph_manifest("unet", "fp32", specs)
    manifests.write(folder / "engine", built_manifest("cpu-unet", made, target, result))
    wrap_engine(folder / "engine", folder / "bundle")
    return load_bundle(folder / "bundle")


# docs/tolerances.md: fp32's gate catches every layer and every swap, fp16's the larger half.
@pytest.mark.parametrize(
    ("damage", "caught_by"),
    [
        (None, []),
        (scaled("conv_in"), ["fp32", "fp16", "bf16"]),
        (scaled("mid_block.resnets.0.conv1"), ["fp32"]),
        (swapped, ["fp32", "fp16"]),
    ],
)
def test_a_damaged_engine_misses_the_gates(
    drawn: tuple[torch.Tensor, Recorder],
    unet_graph: Path,
    tmp_path: Path,
    damage: Damage | None,
    caught_by: list[str],
) -> None:
    engine = engine_of(unet_graph, tmp_path, damage)
    calls = drawn[1].calls[::3]
    found = [difference(engine(*inputs), output) for inputs, (output,) in calls]
    params = params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))
    gates = {name: gate_of(params["validate"], "unet", name) for name in ("fp32", "fp16", "bf16")}
    missed = [name for name, gate in gates.items() if misses_of_component("unet", gate, found)]
    assert missed[: len(caught_by)] == caught_by
    assert damage is not None or not missed


@long
def test_a_doubled_scale_misses_the_gate_of_int8(
    drawn: tuple[torch.Tensor, Recorder], tmp_path: Path
) -> None:
    pytest.importorskip("modelopt", reason="ModelOpt has no wheel for this platform")
    params = params_from_config(yaml.safe_load((ROOT / "params.yaml").read_text()))
    settings = params["quantize"].settings("int8")
    calls = drawn[1].calls
    loaded = load(LEMON, "unet", "fp16", image=IMAGE)
    for name in ("raw", "fp16", "int8"):
        (tmp_path / name).mkdir()
    export_module(
        loaded.module,
        loaded.inputs,
        tmp_path / "raw",
        precision="fp16",
        exporter="dynamo",
        opset=20,
        patches=[],
        vocabulary=0,
    )
    simplify_graph(tmp_path / "raw" / MODEL, tmp_path / "fp16", skipped_optimizers=[])
    lower_precision(
        tmp_path / "fp16",
        tmp_path / "int8",
        [inputs for inputs, _ in calls],
        "unet",
        "int8",
        settings,
        tmp_path / "log",
    )

    def misses() -> list[str]:
        path = tmp_path / "int8" / MODEL
        parity = compare_graphs(path, path, calls[::3], names=("int8", "int8"))
        return parity.misses(settings.rel_l2)

    assert not misses()
    graph = onnx.load(tmp_path / "int8" / MODEL)
    layer = "network.up_blocks.1.upsamplers.0.conv.weight"
    (scale,) = (n.input[1] for n in graph.graph.node if n.input and n.input[0] == layer)
    (tensor,) = (i for i in graph.graph.initializer if i.name == scale)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values * values.dtype.type(2), scale))
    save_with_external_data(graph, tmp_path / "int8" / MODEL)
    assert misses()
