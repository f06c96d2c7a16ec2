"""The library, and sessions that run on the device that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_engines.backends import require
from diffusion_engines.errors import HardwareError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def library(device: str) -> Any:
    """Return the module onnxruntime, which can run on ``device``.

    Raises:
        HardwareError: it is not installed, or lacks the provider.
    """
    package = "onnxruntime-gpu" if device == "cuda" else "onnxruntime"
    ort = require("onnxruntime", f"pip install {package}")
    if _PROVIDERS[device] not in ort.get_available_providers():
        raise HardwareError(
            f"this ONNX Runtime cannot run on {device}",
            expected=_PROVIDERS[device],
            found=", ".join(ort.get_available_providers()),
            fix="install the extra `[cuda]` on a machine with an NVIDIA GPU: it has\n"
            "onnxruntime-gpu, which replaces onnxruntime",
        )
    if device == "cuda":
        ort.preload_dlls()  # CUDA's libraries as PyTorch's wheels bring them
    return ort


def open_session(ort: Any, path: Path, options: Any, device: str, *, tf32: bool) -> Any:
    """Open a session that really runs on ``device``, in TF32 only if asked to.

    Raises:
        HardwareError: ONNX Runtime fell back to the CPU, which it does with a warning alone.
    """
    provider = _PROVIDERS[device]
    # CUDA's default is TF32: an "fp32" VAE decoder then differs by 7e-4 from PyTorch's.
    settings = {"use_tf32": str(int(tf32))} if device == "cuda" else {}
    session = ort.InferenceSession(path, options, providers=[(provider, settings)])
    if provider not in session.get_providers():
        raise HardwareError(
            f"ONNX Runtime {ort.__version__} could not start on {device}",
            expected=provider,
            found=", ".join(session.get_providers()),
            fix="its message is above: most often CUDA's or cuDNN's libraries are missing or of\n"
            "another major version than it was built with",
        )
    return session
