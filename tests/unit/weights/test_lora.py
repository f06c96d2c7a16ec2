"""LoRAs fused into weights: against PEFT's own networks, alone, together, and broken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_engines.errors import WeightsError
from diffusion_engines.families import family_of
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.runtime.networks import read_config
from diffusion_engines.weights.fuse import fuse_loras
from diffusion_engines.weights.lora import Lora, read_lora
from tests.conftest import ROOT
from tests.loras import ATTENTION, EVERY_LAYER, layers_of, write_lora

LEMON = ROOT / "models" / "lemon"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
BOTH = {"unet": ATTENTION, "text_encoder": ATTENTION}
SCALED = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def read(path: Path, weight: float, model: Path) -> Lora:
    family = family_of(model)
    config = read_config(family.denoiser, model / "unet")
    return read_lora(path.parent, path.name, weight, family, config)


def fused(source: Path, folder: Path, *loras: tuple[Path, float]) -> Path:
    shutil.copytree(source, folder)
    fuse_loras([read(path, weight, source) for path, weight in loras], folder)
    return folder


def unet_inputs(network: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    size, channels = network.config.cross_attention_dim, network.config.in_channels
    return (
        torch.randn(2, channels, 8, 8, generator=generator),
        torch.tensor([500, 500]),
        torch.randn(2, 77, size, generator=generator),
    )


def run_unet(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(*unet_inputs(network), return_dict=False)[0]


def run_text_encoder(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.arange(77)[None] % network.config.vocab_size)[0]


def load(cls: Any, model: Path) -> Any:
    if cls is UNet2DConditionModel:
        return cls.from_pretrained(model / "unet", torch_dtype=torch.float32)
    return cls.from_pretrained(model / "text_encoder", dtype=torch.float32)


def with_adapters(cls: Any, model: Path, *loras: tuple[Path, float]) -> Any:
    """The network as diffusers and PEFT run it, with adapters that are not fused."""
    is_unet = cls is UNet2DConditionModel
    network = load(cls, model)
    mixin = StableDiffusionLoraLoaderMixin
    names = []
    for index, (path, _) in enumerate(loras):
        names.append(f"lora{index}")
        state, alphas, header = mixin.lora_state_dict(
            str(path), unet_config=None, return_lora_metadata=True, local_files_only=True
        )
        if is_unet:
            mixin.load_lora_into_unet(state, alphas, network, names[-1], metadata=header)
        else:
            mixin.load_lora_into_text_encoder(
                state, alphas, network, "text_encoder", adapter_name=names[-1], metadata=header
            )
    weights = [weight for _, weight in loras]
    if is_unet:
        network.set_adapters(names, weights)
    else:
        from diffusers.loaders.lora_base import set_adapters_for_text_encoder

        set_adapters_for_text_encoder(names, network, weights)
    return network


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def model(tiny_weights: Path) -> Path:
    return tiny_weights


@pytest.fixture(scope="module")
def lemon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, in fp32, so that its arithmetic can be compared to the last digits."""
    folder = Path(shutil.copytree(LEMON, tmp_path_factory.mktemp("lemon") / "lemon"))
    for name in (UNET, TEXT_ENCODER):
        tensors = {key: value.float() for key, value in load_file(folder / name).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


FORMATS: dict[str, dict[str, Any]] = {
    "diffusers": {},
    "half precision": {"dtype": torch.float16},
    "every linear layer and convolution": {"networks": {"unet": EVERY_LAYER}},
    "header with an alpha": {"settings": SCALED},
    "header with an alpha for some layers": {
        "settings": SCALED | {"alpha_pattern": {"to_k": 7, "attn2.to_q": 0.5}}
    },
    "rank-stabilized": {"settings": SCALED | {"use_rslora": True}},
    "kohya": {"kohya": True},
    "kohya, one alpha": {"kohya": True, "alphas": (1.0,)},
    "kohya, with convolutions": {"kohya": True, "networks": {"unet": EVERY_LAYER}},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_fused_unet_is_the_unet_with_its_adapter(name: str, model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "a.safetensors", model, **FORMATS[name])
    expected = run_unet(with_adapters(UNet2DConditionModel, model, (lora, 0.7)))
    folder = fused(model, tmp_path / "weights", (lora, 0.7))
    network = load(UNet2DConditionModel, folder)
    plain = load(UNet2DConditionModel, model)
    assert largest_difference(run_unet(network), expected) < 1e-5
    assert largest_difference(run_unet(plain), expected) > 1e-2  # it does change the output


def test_every_layer_of_a_unet_has_its_own_alpha(model: Path, tmp_path: Path) -> None:
    """Compared with PEFT's own file: of a kohya file, diffusers 0.42 ignores such alphas."""
    alphas, networks = (1.0, 4.0, 2.5), {"unet": EVERY_LAYER}
    kohya = write_lora(tmp_path / "a.safetensors", model, networks, kohya=True, alphas=alphas)
    layers = layers_of(model / "unet", EVERY_LAYER)
    pattern = {f"^{layer}": alphas[index % 3] for index, layer in enumerate(layers)}
    settings = {"r": 2, "lora_alpha": 9, "alpha_pattern": pattern, "target_modules": [*layers]}
    peft = write_lora(tmp_path / "b.safetensors", model, networks, settings=settings)
    expected = run_unet(with_adapters(UNet2DConditionModel, model, (peft, 0.3)))
    network = load(UNet2DConditionModel, fused(model, tmp_path / "weights", (kohya, 0.3)))
    assert largest_difference(run_unet(network), expected) < 1e-5


@pytest.mark.parametrize("kohya", [False, True])
def test_lemon_fused_is_lemon_with_its_adapter(kohya: bool, lemon: Path, tmp_path: Path) -> None:
    # One alpha for all: diffusers gives the layers of an attention in a text encoder the same.
    lora = write_lora(
        tmp_path / "a.safetensors", lemon, BOTH, kohya=kohya, alphas=(1.0,) if kohya else ()
    )
    folder = fused(lemon, tmp_path / "weights", (lora, 0.6))
    for cls, run in ((UNet2DConditionModel, run_unet), (CLIPTextModel, run_text_encoder)):
        expected = run(with_adapters(cls, lemon, (lora, 0.6)))
        assert largest_difference(run(load(cls, folder)), expected) < 1e-5
        assert largest_difference(run(load(cls, lemon)), expected) > 1e-2


def test_the_lora_that_ships_is_fused_as_peft_applies_it(lemon: Path, tmp_path: Path) -> None:
    lora = LEMON.parents[1] / "loras/ink.safetensors"
    expected = run_unet(with_adapters(UNet2DConditionModel, lemon, (lora, 1.0)))
    found = run_unet(load(UNet2DConditionModel, fused(lemon, tmp_path / "weights", (lora, 1.0))))
    assert largest_difference(found, expected) < 1e-5
    assert largest_difference(run_unet(load(UNet2DConditionModel, lemon)), expected) > 1e-1


def test_every_layer_of_a_text_encoder_has_its_own_alpha(model: Path, tmp_path: Path) -> None:
    lora = write_lora(
        tmp_path / "a.safetensors",
        model,
        {"text_encoder": EVERY_LAYER},
        kohya=True,
        alphas=(1.0, 4.0, 0.5),
    )
    folder = fused(model, tmp_path / "weights", (lora, 0.5))
    given, before = load_file(lora), load_file(model / TEXT_ENCODER)
    after = load_file(folder / TEXT_ENCODER)
    layers = layers_of(model / "text_encoder", EVERY_LAYER)
    assert len(layers) == 12
    for layer in layers:
        name = f"lora_te_text_model_{layer.replace('.', '_')}"
        product = given[f"{name}.lora_up.weight"] @ given[f"{name}.lora_down.weight"]
        expected = before[f"{layer}.weight"] + 0.5 * given[f"{name}.alpha"] / 2 * product
        torch.testing.assert_close(after[f"{layer}.weight"], expected)


def test_checkpoints_of_older_transformers_are_changed_too(model: Path, tmp_path: Path) -> None:
    """Those on the hub, SD 1.4's among them, name every tensor with `text_model.` before it."""
    older = Path(shutil.copytree(model, tmp_path / "older"))
    tensors = {f"text_model.{key}": value for key, value in load_file(model / TEXT_ENCODER).items()}
    save_file(tensors, older / TEXT_ENCODER, metadata={"format": "pt"})
    lora = write_lora(tmp_path / "a.safetensors", model, BOTH)
    new = load_file(fused(model, tmp_path / "new", (lora, 1.0)) / TEXT_ENCODER)
    old = load_file(fused(older, tmp_path / "old", (lora, 1.0)) / TEXT_ENCODER)
    assert {f"text_model.{key}" for key in new} == set(old)
    assert all(torch.equal(new[key], old[f"text_model.{key}"]) for key in new)


@pytest.mark.parametrize("architecture", ["conf/architecture/tiny", "conf/architecture/sd14"])
def test_kohya_s_name_of_every_layer_is_understood(architecture: str, tmp_path: Path) -> None:
    folder = ROOT / architecture
    configs = {name: read_config(FAMILY.component(name), folder / name) for name in BOTH}
    with torch.device("meta"):
        networks = {
            ("unet", "lora_unet_"): UNet2DConditionModel.from_config(configs["unet"]),
            ("text_encoder", "lora_te_text_model_"): CLIPTextModel(
                CLIPTextConfig.from_dict(configs["text_encoder"])
            ),
        }
    for (name, prefix), network in networks.items():
        layers = [
            layer
            for layer, module in network.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        ]
        tensors = {}
        for index, layer in enumerate(layers):
            key = prefix + layer.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.full((1, 1), 1.0 + index)
            tensors[f"{key}.lora_up.weight"] = torch.ones(1, 1)
            tensors[f"{key}.alpha"] = torch.tensor(2.0 + index)
        save_file(tensors, tmp_path / "a.safetensors")
        found = read_lora(tmp_path, "a.safetensors", 1.0, FAMILY, configs["unet"]).layers[name]
        assert set(found) == set(layers)
        for index, layer in enumerate(layers):
            assert float(found[layer].down) == 1 + index
            assert found[layer].scale == 2 + index


# diffusers injects the second adapter with a PEFT function that is meant for the first one
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_loras_add_up_in_any_order(model: Path, tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a.safetensors", model, seed=1), 0.5
    b = write_lora(tmp_path / "b.safetensors", model, BOTH, seed=2, kohya=True), 0.25
    c = write_lora(tmp_path / "c.safetensors", model, seed=3), -1.0
    before = load_file(model / UNET)
    both = load_file(fused(model, tmp_path / "ab", a, b) / UNET)
    alone = [load_file(fused(model, tmp_path / p.stem, (p, w)) / UNET) for p, w in (a, b)]
    for name, tensor in both.items():
        deltas = sum(weights[name].double() - before[name].double() for weights in alone)
        torch.testing.assert_close(
            tensor.double(), before[name].double() + deltas, rtol=0, atol=1e-6
        )
    expected = run_unet(with_adapters(UNet2DConditionModel, model, a, b))
    network = load(UNet2DConditionModel, tmp_path / "ab")
    assert largest_difference(run_unet(network), expected) < 1e-5
    # Any order, to the last bit, so that DVC has nothing to build again.
    orders = ([a, b, c], [c, a, b], [b, c, a])
    written = {
        (fused(model, tmp_path / f"order{index}", *order) / UNET).read_bytes()
        for index, order in enumerate(orders)
    }
    assert len(written) == 1


def test_a_change_is_proportional_to_the_weight(model: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", model)
    before = load_file(model / UNET)
    at = {w: load_file(fused(model, tmp_path / str(w), (path, w)) / UNET) for w in (0.5, 1.0, -1.0)}
    changed = 0
    for name, tensor in before.items():
        half, whole, minus = (at[w][name] - tensor for w in (0.5, 1.0, -1.0))
        torch.testing.assert_close(2 * half, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(-whole, minus, rtol=0, atol=1e-6)
        changed += bool(whole.any())
    assert changed == len(layers_of(model / "unet")) == 56


def test_a_lora_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    """A's weights are gone when B is built after it, as of TensorRT's refit they were not.

    https://github.com/NVIDIA/TensorRT/issues/3628
    """
    a = write_lora(tmp_path / "a.safetensors", model, BOTH, seed=1), 1.0
    b = write_lora(tmp_path / "b.safetensors", model, seed=2), 1.0
    first, second, alone = (tmp_path / name for name in ("first", "second", "alone"))
    fused(model, first, a)
    fused(model, second, b)  # in the same process, after A
    code = (
        "import sys; from pathlib import Path; from tests.unit.weights.test_lora import fused; "
        "fused(Path(sys.argv[1]), Path(sys.argv[2]), (Path(sys.argv[3]), 1.0))"
    )
    subprocess.run([sys.executable, "-c", code, model, alone, b[0]], check=True, cwd=ROOT)
    for name in (UNET, TEXT_ENCODER):
        assert (second / name).read_bytes() == (alone / name).read_bytes()
        assert (second / name).read_bytes() != (first / name).read_bytes()
    # B has no layer of the text encoder, so that one is the model's own.
    assert (second / TEXT_ENCODER).read_bytes() == (model / TEXT_ENCODER).read_bytes()


def test_the_fused_file_is_as_before_but_for_values(lemon: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "watercolour.safetensors", LEMON, dtype=torch.float32)
    folder = fused(LEMON, tmp_path / "weights", (path, 0.8))  # fp16, as it is shipped
    with safe_open(LEMON / UNET, "pt") as old, safe_open(folder / UNET, "pt") as new:
        assert list(old.keys()) == list(new.keys())
        assert old.metadata() == new.metadata()
        for key in old.keys():  # noqa: SIM118
            before, after = old.get_tensor(key), new.get_tensor(key)
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
    header = (folder / UNET).read_bytes()[:200_000]
    assert b"lora" not in header.lower()
    assert b"watercolour" not in header
    assert not list(folder.rglob("*.partial"))
    # fp32 arithmetic, rounded once
    exact = load_file(fused(lemon, tmp_path / "exact", (path, 0.8)) / UNET)
    assert all(torch.equal(exact[k].half(), v) for k, v in load_file(folder / UNET).items())


def test_shards_are_changed_where_they_are(model: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", model)
    whole = load_file(fused(model, tmp_path / "whole", (path, 1.0)) / UNET)
    sharded = Path(shutil.copytree(model, tmp_path / "sharded"))
    tensors = load_file(sharded / UNET)
    (sharded / UNET).unlink()
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = dict(zip(("conv", ""), shards, strict=True))
    weight_map = {key: next(f for p, f in parts.items() if key.startswith(p)) for key in tensors}
    for file in parts.values():
        some = {key: tensors[key] for key in tensors if weight_map[key] == file}
        save_file(some, sharded / "unet" / file, metadata={"format": "pt"})
    index = sharded / f"{UNET}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    untouched = (sharded / "unet" / shards[0]).stat().st_ino
    fuse_loras([read(path, 1.0, model)], sharded)
    assert (sharded / "unet" / shards[0]).stat().st_ino == untouched  # no layer of the LoRA
    found = {k: v for f in parts.values() for k, v in load_file(sharded / "unet" / f).items()}
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_what_each_lora_changed_is_counted(model: Path, tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a.safetensors", model)
    b = write_lora(tmp_path / "b.safetensors", model, {"text_encoder": ATTENTION})
    loras = [read(a, 0.5, model), read(b, 2.0, model)]
    done = fuse_loras(loras, Path(shutil.copytree(model, tmp_path / "weights")))
    assert {name: [entry.file for entry in entries] for name, entries in done.items()} == {
        "unet": ["a.safetensors"],
        "text_encoder": ["b.safetensors"],
    }
    (entry,) = done["unet"]
    assert entry.layers == 56
    assert entry.weight == 0.5
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256)


# Each turns a good file into a bad one.
Damage = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"


def renamed(old: str, new: str) -> Damage:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda tensors: tensors | {key: change(tensors[key])}


def added(key: str) -> Damage:
    return lambda tensors: tensors | {key: torch.ones(4, 4)}


BROKEN: dict[str, tuple[Damage, Sequence[str]]] = {
    "NaN": (
        changed(f"{FIRST}.lora_A.weight", lambda t: t * float("nan")),
        [f"{FIRST}.lora_A.weight has NaN or infinite values", "earlier checkpoint"],
    ),
    "layers that the model lacks": (
        renamed("down_blocks.0", "down_blocks.7"),
        ["is for another model", "down_blocks.7.attentions.0", "and 5 more", "8 of 56"],
    ),
    "wrong shape of one factor": (
        changed(f"{FIRST}.lora_A.weight", lambda t: t[:, :-1].contiguous()),
        ["is for another model", "attn1.to_k has another shape", "1 of 56 layers do not fit"],
    ),
    "rank of one factor": (
        changed(f"{FIRST}.lora_B.weight", lambda t: t[:, :1].contiguous()),
        ["attn1.to_k has another shape"],
    ),
    "a network that the model lacks": (
        renamed("unet.", "text_encoder_2."),
        ["a text_encoder_2, which this model lacks", "SDXL"],
    ),
    "another kind of model": (
        renamed("unet.", "transformer."),
        ["belong to no layer", "transformer.down_blocks", "and 109 more"],
    ),
    "an unknown tensor": (added(f"{FIRST}.hada_w1_a"), ["hada_w1_a", "LoHa"]),
    "a bias": (added(f"{FIRST}.lora_B.bias"), ["lora_B.bias", "biases are not read"]),
    "a DoRA": (added(f"{FIRST}.lora_magnitude_vector"), ["is a DoRA", "source=local"]),
    "a kohya DoRA": (added("lora_unet_mid_block.dora_scale"), ["is a DoRA"]),
    "half a pair": (
        lambda tensors: {k: v for k, v in tensors.items() if k != f"{FIRST}.lora_B.weight"},
        [f"{FIRST} is no low-rank change", "no lora_B"],
    ),
    "the other half": (
        lambda tensors: {k: v for k, v in tensors.items() if k != f"{FIRST}.lora_A.weight"},
        [f"{FIRST} is no low-rank change", "no lora_A"],
    ),
    "a vector": (
        changed(f"{FIRST}.lora_A.weight", lambda t: t[0].contiguous()),
        [f"{FIRST} is no low-rank change"],
    ),
    "nothing in it": (lambda tensors: {}, ["changes nothing", "no layers"]),
    "never trained": (
        lambda tensors: {k: v * ("lora_A" in k) for k, v in tensors.items()},
        ["changes nothing", "before the first step of training"],
    ),
    "an infinite weight": (
        changed(f"{FIRST}.lora_B.weight", lambda t: t * 1e38),
        [f"{FIRST.removeprefix('unet.')}.weight is too large for torch.float32"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_lora_is_refused_with_a_remedy(name: str, model: Path, tmp_path: Path) -> None:
    damage, expected = BROKEN[name]
    path = write_lora(tmp_path / "a.safetensors", model)
    tensors = damage(load_file(path))
    save_file(tensors, path)
    with pytest.raises(WeightsError) as raised:
        fused(model, tmp_path / "weights", (path, 100.0))
    for text in expected:
        assert text in str(raised.value)
    assert "fix:" in str(raised.value)


def test_a_lora_for_another_width_is_refused(model: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", LEMON)
    kept = {k: v for k, v in load_file(path).items() if ".down_blocks.2" not in k}
    save_file({k: v for k, v in kept.items() if ".up_blocks" not in k}, path)  # as tiny has them
    with pytest.raises(WeightsError, match="16 of 16 layers do not fit") as raised:
        fused(model, tmp_path / "weights", (path, 1.0))
    assert "expected: a change of (64, 64)" in str(raised.value)
    assert "found:    (96, 2) · (2, 96)" in str(raised.value)


def test_kohya_s_half_pairs_and_foreign_names_are_refused(model: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", model, kohya=True)
    good = load_file(path)
    key = min(good)
    for tensors in (
        {name: value for name, value in good.items() if name != key},
        good | {f"{key.split('.')[0]}.lora_mid.weight": torch.ones(2, 2)},
        good | {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 2)},
    ):
        save_file(tensors, path)
        with pytest.raises(WeightsError, match="belong to no layer"):
            read(path, 1.0, model)


def test_a_pickle_a_truncated_and_a_missing_file_are_told_apart(
    model: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "loras" / "a.safetensors", model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match="truncated by an interrupted copy"):
        read(path, 1.0, model)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="found:    a pickle"):
        read(path, 1.0, model)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="0 bytes"):
        read(path, 1.0, model)
    with pytest.raises(WeightsError, match=r"b\.safetensors does not exist") as raised:
        read(path.with_name("b.safetensors"), 1.0, model)
    assert "found:    a.safetensors" in str(raised.value)
    assert "dvc add" in str(raised.value)


def test_a_weight_that_overflows_fp16_is_refused(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", LEMON)
    with pytest.raises(WeightsError, match=r"too large for torch\.float16") as raised:
        fused(LEMON, tmp_path / "weights", (path, 1e6))
    assert "lower the weights in model.loras" in str(raised.value)
