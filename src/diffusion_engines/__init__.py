"""Turn a Stable Diffusion checkpoint into inference engines for a fleet of GPUs."""

from diffusion_engines.serve.loading import load_component, load_pipeline

__all__ = ["load_component", "load_pipeline"]
__version__ = "0.1.0"
