"""What a measurement depends on: the machine that it runs on.

Kept apart from the fingerprints of builds (``backends/*.py``), which hold only what an engine
depends on.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from diffusion_engines import cpu


def machine() -> dict[str, Any]:
    """Describe this machine coarsely, so that a reboot or another kernel is the same machine."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total
    return {
        "cpu": cpu.this_cpu().name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "libraries": {
            name: metadata.version(name).split("+")[0]
            for name in ("torch", "diffusers", "transformers")
        },
    }
