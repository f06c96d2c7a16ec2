"""Engines in use: diffusers pipelines made of them, and images from prompts."""
