"""Downloads that break off or are refused, and folders that such downloads leave behind."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines.errors import WeightsError
from diffusion_engines.weights.check import count_parameters, weight_files
from tests.unit.weights.test_weights import REVISION, TOKEN, UNET, Hub, download

INDEX = "diffusion_pytorch_model.safetensors.index.json"


class BreaksOff(Hub):
    """Closes the connection after the first kilobyte of a weights file."""

    def answer(self, body: bytes, kind: str) -> None:
        if self.command == "GET" and len(body) > 1_000_000:
            stream: Any = self.wfile
            write = stream.write
            stream.write = lambda data: write(data[:1024])
            self.close_connection = True
        super().answer(body, kind)


class Silent(Hub, BaseHTTPRequestHandler):
    """Accepts every connection, and never answers."""

    def do_GET(self) -> None:
        self.rfile.read(1)  # until the other side has given up


class Stalls(Hub):
    """Falls silent after the first kilobyte of a weights file, and goes on where it is asked to."""

    ranges: list[str]

    def answer(self, body: bytes, kind: str) -> None:
        asked = self.headers.get("Range", "")
        if self.command == "GET" and len(body) > 1_000_000 and not asked:
            stream: Any = self.wfile
            write = stream.write
            stream.write = lambda data: write(data[:1024])
            super().answer(body, kind)
            stream.flush()
            self.rfile.read(1)
        elif asked:
            self.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[start:])
        else:
            super().answer(body, kind)


class Refuses(Hub, BaseHTTPRequestHandler):
    """Answers every request as the hub does to a token that it does not know."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Gated(Hub, BaseHTTPRequestHandler):
    """Answers every request as the hub does for a model whose licence was not accepted."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (
            BreaksOff,
            ["could not be reached for someone/model", "RemoteProtocolError", "whole are kept"],
        ),
        (
            Silent,
            [
                "could not be reached for someone/model",
                "ReadTimeout: timed out",
                "HF_HUB_DOWNLOAD_TIMEOUT",
                "download … 2 s: 0.00 GB are here; waiting for http://127.0.0.1:",
            ],
        ),
        (Refuses, ["does not give out someone/model", "HTTP 401", "export HF_TOKEN="]),
        (Gated, ["does not give out someone/model", "accept the licence"]),
    ],
)
def test_a_hub_that_fails_ends_with_a_remedy(
    behaviour: type[Hub], expected: list[str], tiny_weights: Path, tmp_path: Path
) -> None:
    done = download_from(behaviour, tiny_weights, tmp_path)
    assert done.returncode == 1
    for text in expected:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert not (tmp_path / "weights").exists()


def download_from(
    behaviour: type[Hub], weights: Path, folder: Path, chunk: int = 10 << 20, **attributes: Any
) -> subprocess.CompletedProcess[str]:
    """Download a UNet from a hub that behaves in some way."""
    files = {UNET: weights / UNET}
    handler = type("Failing", (behaviour,), {"files": files, "tokens": set(), **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return download(f"http://127.0.0.1:{server.server_port}", folder, REVISION, chunk)
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_goes_on_where_a_silent_hub_left_it(tiny_weights: Path, tmp_path: Path) -> None:
    ranges: list[str] = []
    done = download_from(Stalls, tiny_weights, tmp_path, 1024, ranges=ranges)
    assert done.returncode == 0, done.stderr
    assert ranges == ["bytes=1024-"]
    assert (tmp_path / "weights" / UNET).read_bytes() == (tiny_weights / UNET).read_bytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"weight_map": {"conv_in.weight"', "JSONDecodeError"),
        ("{}", "'weight_map'"),
        ("[]", "TypeError"),
        ('{"weight_map": [1]}', "AttributeError"),
        ('{"weight_map": {"conv_in.weight": 1}}', "TypeError"),
        ('{"weight_map": {"conv_in.weight": "/etc/passwd"}}', "a shard called '/etc/passwd'"),
        ('{"weight_map": {"conv_in.weight": "../vae/x-1-of-1.safetensors"}}', "called '../vae/"),
    ],
)
def test_a_damaged_index_of_shards_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(WeightsError, match=r"not an index of shards") as raised:
        list(weight_files(tmp_path))
    assert expected in str(raised.value)
    assert "get it again" in str(raised.value)


def test_a_truncated_shard_is_named(weights_copy: Path) -> None:
    folder = weights_copy / "unet"
    shard = folder / "diffusion_pytorch_model-00001-of-00001.safetensors"
    (weights_copy / UNET).rename(shard)
    (folder / INDEX).write_text(f'{{"weight_map": {{"conv_in.weight": "{shard.name}"}}}}')
    assert count_parameters(folder) == 1_466_500
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="not a whole safetensors file") as raised:
        count_parameters(folder)
    assert shard.name in str(raised.value)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_within_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [empty, cut_within_the_header])
def test_a_file_without_a_header_is_refused(
    weights_copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(weights_copy / UNET)
    with pytest.raises(WeightsError, match="not a whole safetensors file") as raised:
        count_parameters(weights_copy / "unet")
    assert f"{(weights_copy / UNET).stat().st_size} bytes" in str(raised.value)


def test_a_folder_with_another_variant_alone_names_it(weights_copy: Path) -> None:
    variant = "diffusion_pytorch_model.fp16.safetensors"
    (weights_copy / UNET).rename(weights_copy / "unet" / variant)
    with pytest.raises(WeightsError, match="no safetensors weights") as raised:
        list(weight_files(weights_copy / "unet"))
    assert f"found:    {variant}" in str(raised.value)
