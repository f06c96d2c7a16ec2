"""Turn a Stable Diffusion checkpoint into inference engines for a fleet of GPUs."""

import os

# ONNX Runtime 1.32 reports to its makers, and keeps a database in the user's folder, unless this is
# set before it is imported: its own `disable_telemetry_events()` comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # what comes with each request to the hub

from diffusion_engines.serve.loading import load_component, load_pipeline

__all__ = ["load_component", "load_pipeline"]
__version__ = "0.1.0"
