"""The versions of what wrote a graph, for its manifest.

They are recorded and do not decide what is rebuilt: a fleet shares exports between machines whose
PyTorch differs. `dvc repro --force export@KEY` exports anew.
"""

from __future__ import annotations

from importlib import metadata


def exporter_versions() -> dict[str, str]:
    """Return the versions of the libraries that an export goes through."""
    return _versions("torch", "diffusers", "transformers", "onnx", "onnxscript")


def program_versions() -> dict[str, str]:
    """Return the versions of the libraries that an exported program goes through."""
    return _versions("torch", "diffusers", "transformers")


def simplifier_versions() -> dict[str, str]:
    """Return the version of the simplifier."""
    return _versions("onnxsim")


def quantizer_versions() -> dict[str, str]:
    """Return the versions of the libraries that quantization goes through."""
    return _versions("nvidia-modelopt", "onnxruntime")


def _versions(*names: str) -> dict[str, str]:
    # "+cpu" and "+cu130" export the same graph.
    return {name: metadata.version(name).split("+")[0] for name in names}
