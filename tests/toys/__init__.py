"""A backend and a family of one module each, which tests add to a clone and run through the DAG."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.pipeline.conftest import Clone

_TOYS = Path(__file__).parent
_TARGET = """\
# A card that only the test's environment has. In a fleet: `- /target@targets.toy: toy`
defaults:
  - /build@build: toy
backend: toy
gpu: alpha
"""
_BUILD = """\
# Builder settings of the toy backend. `dvc exp run -S targets.toy.build.effort=2`
effort: 1
"""
_MODEL = """\
# @package _global_
# A transformer that is told a class, at the smallest useful size, random weights. `-S model=toy`
defaults:
  - tiny
  - override /validate: toy
  - _self_
model:
  name: toy
  folder: conf/architecture/toy
  parameters: {}
"""
_VALIDATE = """\
# The tolerances of a component that the other families lack. `-S validate=toy`
defaults:
  - default
  - _self_
components:
  transformer:
    fp32: {rel_l2: 1.0e-4, max_abs: 1.0e-3, cosine: 0.99999}
    fp16: {rel_l2: 4.0e-3, max_abs: 5.0e-2, cosine: 0.9999}
"""
_TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def add_backend(clone: Clone) -> None:
    """Add the toy backend: its package, and the YAML of its target and its settings."""
    package = clone.path / "src/diffusion_engines/backends/toy"
    package.mkdir()
    shutil.copyfile(_TOYS / "backend.py", package / "__init__.py")
    (clone.path / "conf/target/toy.yaml").write_text(_TARGET)
    (clone.path / "conf/build/toy.yaml").write_text(_BUILD)


def add_family(clone: Clone) -> None:
    """Add the toy family: its module, the YAML of a model and its tolerances, an architecture."""
    shutil.copyfile(_TOYS / "family.py", clone.path / "src/diffusion_engines/families/toy.py")
    conf = clone.path / "conf"
    (conf / "model/toy.yaml").write_text(_MODEL)
    (conf / "validate/toy.yaml").write_text(_VALIDATE)
    folder = conf / "architecture/toy"
    for name in ("vae", "scheduler"):
        shutil.copytree(conf / "architecture/tiny" / name, folder / name)
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(_TRANSFORMER, indent=2))
    index = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
