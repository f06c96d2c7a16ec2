"""Weights from every source, and what is wrong with them, before anything is built on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families import family_of
from diffusion_engines.runtime.networks import network_from_config, read_config
from diffusion_engines.weights import sources
from diffusion_engines.weights.check import check_parameters, count_parameters, weight_files
from tests.conftest import ROOT, TINY
from tests.models import section

UNET = "unet/diffusion_pytorch_model.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_that_must_not_be_seen"


@pytest.mark.parametrize("model", ["tiny", "sd14", "sd15", "sd21", "sdxl", "sdxl-turbo"])
def test_architectures_have_the_parameters_that_the_config_says(model: str) -> None:
    expected = section(model, "model")
    components = family_of(ROOT / expected["folder"]).components
    assert set(expected["parameters"]) == {spec.folder for spec in components.values()}
    for spec in components.values():
        config = read_config(spec, ROOT / expected["folder"] / spec.folder)
        with torch.device("meta"):
            network = network_from_config(spec, config)
        found = sum(parameter.numel() for parameter in network.parameters())
        assert found == expected["parameters"][spec.folder]


@pytest.mark.parametrize(
    ("model", "unet", "encoders"),
    [
        ("sd14", 859_520_964, {"text_encoder": 123_060_480}),
        ("sd15", 859_520_964, {"text_encoder": 123_060_480}),
        ("sd21", 865_910_724, {"text_encoder": 340_387_840}),
        ("sdxl", 2_567_463_684, {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_models_are_of_the_published_size(model: str, unet: int, encoders: dict[str, int]) -> None:
    found = section(model, "model")["parameters"]
    assert found == {"unet": unet, "vae": 83_653_863, **encoders}


# SD 2 and SDXL's second encoder were trained with another padding: the token 0, "!".
@pytest.mark.parametrize(
    ("folder", "padding"),
    [
        ("sd14/tokenizer", 49407),
        ("sd21/tokenizer", 0),
        ("sdxl/tokenizer", 49407),
        ("sdxl/tokenizer_2", 0),
        ("sdxl-turbo/tokenizer_2", 0),
    ],
)
def test_tokenizers_have_clips_vocabulary_and_their_own_padding(folder: str, padding: int) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "conf/architecture" / folder)
    assert len(tokenizer) == 49408
    tokens = tokenizer(
        "A big banana leaf with lemons in front of it", padding="max_length", max_length=14
    ).input_ids
    words = [49406, 320, 1205, 8922, 7232, 593, 29576, 530, 2184, 539, 585, 49407]
    assert tokens == [*words, padding, padding]


def test_the_vocabulary_is_in_the_repository_once() -> None:
    copies = list((ROOT / "conf/architecture").glob("sd*/tokenizer*/vocab.json"))
    assert len(copies) == 6
    assert {path.resolve() for path in copies} == {
        ROOT / "conf/architecture/sd14/tokenizer/vocab.json"
    }


def test_random_weights_are_seeded(tiny_weights: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        sources.fill_with_random_weights(TINY, tmp_path / str(seed), seed=seed, dtype="fp32")
    assert (tmp_path / "0" / UNET).read_bytes() == (tiny_weights / UNET).read_bytes()
    assert (tmp_path / "1" / UNET).read_bytes() != (tiny_weights / UNET).read_bytes()


def test_sound_weights_are_counted(tiny_weights: Path) -> None:
    assert count_parameters(tiny_weights / "unet") == 1_466_500
    check_parameters("unet", 1_466_500, 1_466_500)
    with pytest.raises(WeightsError, match="1,466,500"):
        check_parameters("unet", 7, 1_466_500)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_refused(weights_copy: Path, value: float) -> None:
    tensors = load_file(weights_copy / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = value
    save_file(tensors, weights_copy / UNET, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"conv_in\.weight has NaN or infinite"):
        count_parameters(weights_copy / "unet")


def test_a_truncated_file_is_refused(weights_copy: Path) -> None:
    path = weights_copy / UNET
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        count_parameters(weights_copy / "unet")


def test_a_missing_shard_is_named(weights_copy: Path) -> None:
    folder = weights_copy / "unet"
    tensors = load_file(weights_copy / UNET)
    (weights_copy / UNET).unlink()
    names = sorted(tensors)
    first, second = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    shards = {first: names[:10], second: names[10:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert count_parameters(folder) == 1_466_500
    (folder / second).unlink()
    with pytest.raises(WeightsError, match=f"{second} is missing") as raised:
        count_parameters(folder)
    assert first in str(raised.value)


def test_pickles_are_not_read(weights_copy: Path) -> None:
    (weights_copy / UNET).rename(weights_copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match="no safetensors") as raised:
        list(weight_files(weights_copy / "unet"))
    assert "diffusion_pytorch_model.bin" in str(raised.value)
    assert "safe_serialization=True" in str(raised.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no diffusers model folder"):
        sources.copy_from_folder(tmp_path / "nothing", tmp_path / "copy")


def test_a_wrong_scale_factor_is_refused(tiny_weights: Path) -> None:
    sources.check_scale_factor(tiny_weights, 8)
    with pytest.raises(ConfigError, match="vae_scale_factor"):
        sources.check_scale_factor(tiny_weights, 4)


DOWNLOAD = """
import sys
import time
from pathlib import Path
time.sleep = lambda seconds: None  # which the hub's library does before each of its retries
from huggingface_hub import constants
from diffusion_engines import progress
from diffusion_engines.errors import WeightsError
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.weights.sources import copy_from_hub, hub_progress
constants.DOWNLOAD_CHUNK_SIZE = int(sys.argv[3])
progress._HEARTBEAT_SECONDS = 0.8
try:
    with progress.step("download") as running:
        running.now = hub_progress("someone/model")
        copy_from_hub("someone/model", sys.argv[1], FAMILY.wanted, Path(sys.argv[2]))
except WeightsError as error:
    sys.exit(str(error))
"""


def download(
    endpoint: str, home: Path, revision: str, chunk: int = 10 << 20
) -> subprocess.CompletedProcess[str]:
    """Run a download; a file goes on after the last whole ``chunk`` of bytes that came."""
    # In a process of its own: huggingface_hub reads its environment once, on import.
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, revision, home / "weights", str(chunk)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ
        | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1",
        },
    )


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a snapshot download asks for."""

    files: dict[str, Path]
    tokens: set[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.split("?")[0]
        if path == f"/api/models/someone/model/revision/{REVISION}":
            names = [{"rfilename": name} for name in self.files]
            info = {"id": "someone/model", "sha": REVISION, "siblings": names}
            self.answer(json.dumps(info).encode(), "application/json")
            return
        if path == f"/api/models/someone/model/tree/{REVISION}":
            tree = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40}
                for n, f in self.files.items()
            ]
            self.answer(json.dumps(tree).encode(), "application/json")
            return
        prefix = f"/someone/model/resolve/{REVISION}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.files:
            self.answer(self.files[path.removeprefix(prefix)].read_bytes(), "binary/octet-stream")
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("ETag", f'"{sha256(body).hexdigest()}"'),
            ("X-Repo-Commit", REVISION),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(tiny_weights: Path, tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    folder = Path(shutil.copytree(tiny_weights, tmp_path / "hub"))
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / name).write_bytes(b"not wanted")
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    handler = type("TinyHub", (Hub,), {"files": files, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_a_download_takes_what_is_wanted_and_hides_the_token(
    hub: tuple[str, type[Hub]], tiny_weights: Path, tmp_path: Path
) -> None:
    endpoint, handler = hub
    done = download(endpoint, tmp_path, REVISION)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "weights"
    assert (weights / UNET).read_bytes() == (tiny_weights / UNET).read_bytes()
    names = {p.relative_to(weights).as_posix() for p in weights.rglob("*") if p.is_file()}
    assert {"model_index.json", "tokenizer/vocab.json", "vae/config.json", UNET} <= names
    assert not any(".bin" in name or "fp16" in name for name in names)
    assert f"Bearer {TOKEN}" in handler.tokens
    assert TOKEN not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_a_revision_that_the_hub_lacks_is_named(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    done = download(hub[0], tmp_path, "f" * 40)
    assert done.returncode == 1
    assert f"the hub has no someone/model at {'f' * 40}" in done.stderr
    assert "conf/model/" in done.stderr


def test_a_hub_that_cannot_be_reached_says_what_else_works(tmp_path: Path) -> None:
    done = download("http://127.0.0.1:9", tmp_path, REVISION)
    assert done.returncode == 1
    assert "could not be reached for someone/model" in done.stderr
    assert "model.source=local" in done.stderr
    assert TOKEN not in done.stderr
    assert not (tmp_path / "weights").exists()
