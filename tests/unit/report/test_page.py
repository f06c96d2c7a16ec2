from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from diffusion_engines import config
from diffusion_engines.errors import IntegrityError
from diffusion_engines.parity.scorers import Scores
from diffusion_engines.report.page import write_report
from diffusion_engines.report.prices import price_of, thousand_pictures
from tests.reports import PYTORCH, Made, write_generated


def written(made: Made) -> str:
    write_report(made.workspace, made.folder, **made.arguments)
    return (made.folder / "index.html").read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """The page as a person reads it, without tags and pictures."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def summary(made: Made) -> dict[str, Any]:
    written(made)
    return json.loads((made.folder / "fleet.json").read_text())


class Loads(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "srcset", "href", "data", "action")
        self.found += [value or "" for name, value in attrs if name in names]


def test_page_is_self_contained(fleet) -> None:
    page = written(fleet())
    loads = Loads()
    loads.feed(page)
    assert loads.found
    assert all(value.startswith(("data:", "#")) for value in loads.found)
    assert not loads.tags & {"script", "link", "iframe", "object", "embed"}
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_page_shows_measurements_beside_their_gates(fleet) -> None:
    text = words_of(written(fleet()))
    assert "1.0e-05 (≤ 1.0e-04)" in text
    assert "within tolerance" in text
    assert "≥ 60" in text
    assert "Testor 9000, 4 cores, 16 GiB" in text
    assert "2.50×" in text


def test_page_escapes_prompts(fleet) -> None:
    page = written(fleet())
    assert "<script>" not in page
    assert "lemons &amp; &lt;script&gt;" in page


def test_speedups_are_over_the_first_baseline_whatever_its_name(fleet) -> None:
    compiled = dataclasses.replace(PYTORCH, compile="default")
    made = fleet(baselines={"as_before": PYTORCH, "compiled": compiled})
    text = words_of(written(made))
    assert "24.0 ms PyTorch eager, fp32: 60.0 ms; 3 steps, on Testor 9000" in text
    assert "cpu beside PyTorch eager, fp32" in text
    assert "torch.compile, default, fp32" in text
    assert summary(made)["engines"][1]["speed"] == "12.0 ms, 2.50× PyTorch"


def test_memory_on_a_gpu_is_the_drivers_figure_with_pytorchs_beside_it(fleet) -> None:
    assert "GPU memory" not in words_of(written(fleet()))
    text = words_of(written(fleet(gpus=("GPU A",))))
    assert "peak GPU memory 3.00 GB 3.00 GB of it PyTorch’s 1.00 MB 1.00 MB" in text


@pytest.mark.parametrize(("source", "shown"), [("synthetic", True), ("hub", False)])
def test_page_calls_random_weights_synthetic(fleet, source, shown) -> None:
    made = fleet(source=source)
    if source == "hub":
        for path in (made.workspace.artifacts / "engines").rglob("manifest.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"synthetic": False}))
    assert ("Synthetic weights." in words_of(written(made))) is shown
    assert summary(made)["synthetic"] is shown


def test_page_names_what_was_fused(fleet) -> None:
    made = fleet()
    assert "LoRA" not in words_of(written(made))
    assert summary(made)["loras"] == []
    path = made.workspace.engine("cpu", "unet") / "manifest.json"
    entry = {"file": "ink.safetensors", "sha256": "c" * 64, "weight": 0.8, "layers": 56}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loras": [entry]}))
    model = made.arguments["model"]
    lora = config.Lora("ink.safetensors", 0.8)
    made.arguments["model"] = dataclasses.replace(model, loras=[lora])
    assert f"ink.safetensors 0.8 56 layers of unet {'c' * 64}" in words_of(written(made))
    assert summary(made)["loras"] == ["ink.safetensors × 0.8"]


def test_a_price_says_what_a_thousand_pictures_cost(fleet) -> None:
    made = fleet(gpus=("NVIDIA A100-SXM4-40GB",))
    assert "thousand pictures" not in words_of(written(made))  # no price is made up
    source = "https://prices.example/<gpu>"
    price = config.Price(2.0, "EUR", source, "2026-11-25")
    made.arguments["prices"] = {"A10": dataclasses.replace(price, per_hour=9.0), "A100": price}
    text = words_of(written(made))
    # 2 an hour; PyTorch makes 33.3 pictures a second, the engines 83.3
    assert "a thousand pictures, EUR 0.02 0.01" in text
    assert f"Price: A100 at 2.0 EUR an hour, 2026-11-25, {html.escape(source)}" in text
    assert thousand_pictures(price, 0.5) == pytest.approx(2.0 * 2000 / 3600)
    machine = {"gpus": [], "cpu": "AMD EPYC"}
    assert price_of(machine, {"A100": price, "EPYC": price}) == ("EPYC", price)


def test_synthetic_engines_are_named_so_whatever_the_config_says(fleet) -> None:
    assert "Synthetic weights." in words_of(written(fleet(source="hub")))


def test_fleet_summary_has_what_repro_prints(fleet) -> None:
    found = summary(fleet())
    rows = {row["name"]: row for row in found["engines"]}
    assert found["model"] == "toy"
    assert list(rows) == ["cpu-text_encoder", "cpu-unet", "rtx-unet"]
    assert rows["cpu-unet"]["bytes"] == 3500
    assert rows["cpu-unet"]["build_seconds"] == 2.5
    assert rows["cpu-unet"]["parity"] == "rel L2 1.0e-05, ok"
    assert rows["cpu-unet"]["speed"].startswith("12.0 ms, 2.50")
    assert rows["rtx-unet"]["parity"] == "graph rel L2 5.0e-04"
    assert rows["rtx-unet"]["speed"] == "not run here"


QUANTIZED = {
    "rtx-unet": "fp16",
    "rtx8-unet": "int8",
    "cpu-unet": "fp32",
}


def test_lower_precisions_stand_beside_their_source(fleet) -> None:
    made = fleet(QUANTIZED, quantized={"unet-int8": "fp16"})
    rows = {row["name"]: row["parity"] for row in summary(made)["engines"]}
    assert rows["cpu-unet"] == "rel L2 1.0e-05, ok"  # an engine that ran
    assert rows["rtx-unet"] == "graph rel L2 5.0e-04"
    assert rows["rtx8-unet"] == "graph rel L2 5.0e-02"
    text = words_of(written(made))
    assert "unet-int8 7.00 kB 16 calls 60 MatMul, 40 Conv 2 Conv 5.0e-02 (≤ 1.0e-01)" in text
    assert "unet-fp16 5.0e-04 within tolerance" in text
    assert (made.folder / "quantization.png").stat().st_size > 5000


@pytest.mark.parametrize("worst", [0.2, float("inf")])
def test_a_quantized_graph_out_of_tolerance_is_shown_as_such(fleet, worst: float) -> None:
    made = fleet(QUANTIZED, quantized={"unet-int8": "fp16"}, errors=(0.02, worst))
    text = words_of(written(made))
    assert f"{'∞' if worst > 1 else '2.0e-01'} (≤ 1.0e-01)" in text
    assert "missed" in text.split("What the lower precisions cost")[1].split("Latency")[0]


def test_a_fleet_without_lower_precisions_says_nothing_of_them(fleet) -> None:
    assert "lower precisions" not in words_of(written(fleet()))


def test_nothing_measured(fleet) -> None:
    made = fleet({"rtx40-unet": "fp16"}, measure=())
    text = words_of(written(made))
    assert not (made.workspace.artifacts / "validation").exists()
    assert "built, not run here" in text
    assert "Nothing was measured on this machine" in text
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "fleet.json",
        "index.html",
        "trajectory.gif",
    ]


def test_several_targets_each_name_their_hardware(fleet) -> None:
    engines = {"cpu-unet": "fp32", "cuda-unet": "fp16"}
    made = fleet(engines, measure=("cpu", "cuda"), gpus=("GPU A", "GPU A"))
    assert "2 × GPU A" in words_of(written(made))
    assert {path.name for path in made.folder.glob("*.png")} == {
        f"{figure}-{target}.png"
        for figure in ("breakdown", "latents", "parity")
        for target in ("cpu", "cuda")
    }


def test_latents_along_the_runs_stand_beside_their_gate(fleet) -> None:
    made = fleet()
    text = words_of(written(made))
    runs = text.split("whole runs from the same noise")[1]
    assert "relative L2 1.0e-05 (≤ 2.0e-03)" in runs
    assert "cosine 0.9999990 (≥ 0.9999)" in runs
    assert (made.folder / "latents-cpu.png").stat().st_size > 5000
    assert "MISSED" not in text
    found = words_of(written(fleet({"cpu-unet": "fp32"}, rel_l2=5e-3)))
    assert "relative L2 5.0e-03 (≤ 2.0e-03)" in found
    assert "MISSED" in found


def test_scores_that_were_not_measured_say_why_and_once(fleet) -> None:
    text = words_of(written(fleet()))
    for label, name in (("LPIPS", "lpips"), ("CLIP score", "clip")):
        assert text.count(f"{label} not measured: models/scorers/{name} is not there.") == 1
    assert "LPIPS (AlexNet)" not in text


def test_scores_stand_beside_the_images(fleet) -> None:
    scores = {
        "lpips": Scores((0.0, 0.0123)),
        "clip": Scores((27.5, 31.25), (27.25, 31.0)),
    }
    text = words_of(written(fleet(scores=scores)))
    assert "LPIPS 0.0123, CLIP score 31.25 (reference 31.00)" in text
    assert "LPIPS (AlexNet): 0 is equal" in text
    assert "not measured" not in text


def test_differences_name_their_factor(fleet) -> None:
    text = words_of(written(fleet()))
    assert "no difference in 8 bits" in text
    assert "difference × 64; largest 3 of 255" in text


def test_generated_images_stand_with_their_prompts(fleet) -> None:
    made = fleet()
    assert "What the engines paint" not in words_of(written(made))
    write_generated(made.workspace, "cpu", 2, animated=True)
    page = written(made)
    assert page.count("data:image/gif") == 3  # and the reference's
    text = words_of(page)
    assert "cpu: euler, 9 steps, guidance 5.0, 16 × 8 pixels." in text
    assert "“fruit number 1”, seed 8" in text


def test_many_generated_images_are_counted_and_not_shown(fleet) -> None:
    made = fleet()
    write_generated(made.workspace, "cpu", 5, animated=False)
    page = written(made)
    assert page.count("data:image/gif") == 1
    text = words_of(page)
    assert "The first 3 of 5 images; 2 more are in artifacts/images/cpu" in text
    assert "fruit number 2" in text
    assert "fruit number 3" not in text


def test_stale_targets_are_not_read(fleet) -> None:
    made = fleet()
    for folder in ("validation", "benchmark"):
        stale = made.workspace.artifacts / folder / "gone" / f"{folder}.json"
        stale.parent.mkdir()
        stale.write_text("not JSON")
    assert "gone" not in words_of(written(made))


def test_open_dimensions_are_shown_as_ranges(fleet) -> None:
    dim = {"name": "batch", "size": 2, "min": 2, "max": 8, "step": 2}
    text = words_of(written(fleet(batch=dim)))
    assert "batch 2 (2 to 8, step 2) × 4 × 8" in text


def test_missing_tolerance_is_said(fleet) -> None:
    made = fleet(rel_l2=1e-2)
    assert "missed" in words_of(written(made))
    assert "MISSED" in summary(made)["engines"][0]["parity"]


def test_many_misses_are_counted_and_not_shown(fleet) -> None:
    engines = {"cpu-text_encoder": "fp32", "cpu-unet": "fp32"}
    text = words_of(written(fleet(engines, rel_l2=1e-3)))
    assert "unet (fp32), call 5" in text
    assert "more, in" not in text
    text = words_of(written(fleet(engines | {"cpu-vae_decoder": "fp32"}, rel_l2=1e-3)))
    assert "vae_decoder (fp32), call 0" not in text
    assert "and 2 more, in artifacts/validation/cpu/validation.json" in text


def test_damaged_artifacts_are_named(fleet) -> None:
    made = fleet()
    (made.workspace.engine("cpu", "unet") / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"engines/cpu/unet/manifest\.json"):
        written(made)


def test_equal_artifacts_give_equal_bytes(fleet, tmp_path) -> None:
    made = fleet()
    written(made)
    first = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    again = tmp_path / "again"
    again.mkdir()
    written(dataclasses.replace(made, folder=again))
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
