"""Turn a Stable Diffusion checkpoint into inference engines for a fleet of GPUs."""

__version__ = "0.1.0"
