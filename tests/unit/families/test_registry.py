"""Families are found, by module and by entry point, and cost nothing to read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_engines import families
from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families import FAMILIES, family_of, find_families, role_of
from diffusion_engines.files import write_json

# A family as somebody else would bring it: one module.
TOY = """
from dataclasses import replace
from diffusion_engines.families import stable_diffusion

FAMILY = replace(stable_diffusion.FAMILY, class_name="ToyPipeline")
"""


def test_families_are_read_without_any_heavy_library() -> None:
    code = (
        "import sys\n"
        "heavy = ('torch', 'diffusers', 'transformers', 'numpy')\n"
        "for name in heavy: sys.modules[name] = None\n"  # an import of it would fail
        "from diffusion_engines.families import FAMILIES\n"
        "print(*FAMILIES)\n"
        "print(*(f.wanted + f.folders for f in FAMILIES.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].split() == list(FAMILIES)


def test_a_module_of_the_package_is_a_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dropped_in.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert set(find_families()) == {*FAMILIES, "ToyPipeline"}


def test_an_installed_package_brings_a_family(tmp_path: Path) -> None:
    (tmp_path / "toy_engines.py").write_text(TOY)
    info = tmp_path / "toy_engines-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engines\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{families.GROUP}]\ntoy = toy_engines:FAMILY\n")
    write_json(tmp_path / "model_index.json", {"_class_name": "ToyPipeline"})
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from diffusion_engines.families import family_of\n"
        "print(family_of(Path(sys.argv[1])).class_name)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "ToyPipeline\n"


def test_two_families_of_one_class_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "again.py").write_text(TOY.replace("ToyPipeline", "StableDiffusionPipeline"))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match="of one class, StableDiffusionPipeline"):
        find_families()


def test_a_folder_names_its_family_or_the_error_says_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no diffusers model folder"):
        family_of(tmp_path)
    for name, family in FAMILIES.items():
        write_json(tmp_path / "model_index.json", {"_class_name": name})
        assert family_of(tmp_path) is family
    write_json(tmp_path / "model_index.json", {"_class_name": "NoSuchPipeline"})
    with pytest.raises(ConfigError, match="no engines are built for") as raised:
        family_of(tmp_path)
    assert "StableDiffusionPipeline or StableDiffusionXLPipeline" in str(raised.value)


def test_a_name_means_one_role_in_every_family() -> None:
    for family in FAMILIES.values():
        for name, component in family.components.items():
            assert role_of(name) == component.role
        assert (family.denoiser.role, family.decoder.role) == ("denoiser", "decoder")
        assert family.with_role("control") == ()
    assert role_of("no such component") is None
