"""Write the report: one page that needs no server and no network, its figures, and a summary."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from diffusion_engines import config
from diffusion_engines.bench.results import PHASES, Benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.families import role_of
from diffusion_engines.files import write_json
from diffusion_engines.layout import Workspace
from diffusion_engines.parity.distances import worst_of
from diffusion_engines.report import text
from diffusion_engines.report.collect import Engine, Report, collect
from diffusion_engines.report.figures import (
    draw_breakdown,
    draw_latents,
    draw_parity,
    draw_quantization,
    drawn_width,
)
from diffusion_engines.report.images import (
    amplified_difference,
    last_frame,
    still,
    write_trajectory,
)
from diffusion_engines.report.prices import thousand_pictures

# Generated images of each target that the page holds, so that it stays small.
_SHOWN = 3
# Of what is out of tolerance; the rest is in validation.json.
_SHOWN_MISSES = 10
_MIME = {".png": "image/png", ".gif": "image/gif"}


def write_report(
    workspace: Workspace,
    folder: Path,
    model: config.Model,
    image: config.Image,
    graphs: Mapping[str, config.Graph],
    engines: Mapping[str, config.Engine],
    measured: Sequence[str],
    alternatives: Sequence[str] = (),
    prices: Mapping[str, config.Price] | None = None,
) -> None:
    """Write ``index.html``, the figures, ``trajectory.gif`` and ``fleet.json`` into ``folder``.

    Raises:
        IntegrityError: something that the fleet must have is missing from artifacts/.
    """
    report = collect(workspace, model, image, graphs, engines, measured, alternatives, prices)
    figures: dict[str, Path] = {"trajectory": folder / "trajectory.gif"}
    write_trajectory(figures["trajectory"], report.reference.frames, report.reference.frame_steps)
    for target, benchmark in report.benchmarks.items():
        figures[f"breakdown-{target}"] = folder / f"breakdown-{target}.png"
        draw_breakdown(figures[f"breakdown-{target}"], benchmark)
    for target, validation in report.validations.items():
        figures[f"parity-{target}"] = folder / f"parity-{target}.png"
        draw_parity(figures[f"parity-{target}"], validation, report.reference.batches)
        figures[f"latents-{target}"] = folder / f"latents-{target}.png"
        draw_latents(figures[f"latents-{target}"], validation.latents)
    if report.quantizations:
        figures["quantization"] = folder / "quantization.png"
        draw_quantization(figures["quantization"], report.quantizations, report.reference.batches)
    write_json(folder / "fleet.json", fleet_summary(report))
    (folder / "index.html").write_text(render(report, figures), encoding="utf-8")


def render(report: Report, figures: Mapping[str, Path]) -> str:
    """Return the page, with every picture inside it."""
    environment = page_environment("report")
    environment.globals["text"] = text
    environment.globals["last_frame"] = last_frame
    environment.globals["still"] = still
    environment.globals["drawn_width"] = drawn_width
    environment.globals["worst_of"] = worst_of
    return environment.get_template("page.html.j2").render(
        report=report,
        figures=figures,
        parity=parity_text,
        status=engine_status,
        run_rows=run_rows,
        denoiser=denoiser_name(report),
        shown=_SHOWN,
        shown_misses=_SHOWN_MISSES,
    )


def page_environment(package: str) -> jinja2.Environment:
    """Return what renders the templates of a package as pages that hold their pictures and style.

    Args:
        package: of this project, such as ``report``.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffusion_engines", package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = jinja2.PackageLoader("diffusion_engines", "report")
    environment.globals["css"], _, _ = styles.get_source(environment, "page.css")
    environment.globals["data_uri"] = data_uri
    environment.globals["difference"] = amplified_difference
    return environment


def data_uri(picture: Path | bytes) -> str:
    """Return a picture as a URI that holds it; bytes are PNG."""
    if isinstance(picture, Path):
        mime, data = _MIME[picture.suffix], picture.read_bytes()
    else:
        mime, data = "image/png", picture
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def fleet_summary(report: Report) -> dict[str, Any]:
    """Return what ``make repro`` prints at its end: a row per engine."""
    return {
        "model": report.model.name,
        "synthetic": report.synthetic,
        "loras": [f"{lora.file} × {lora.weight:g}" for lora in report.model.loras],
        "engines": [
            {
                "name": engine.name,
                "builder": engine.builder,
                "precision": engine.precision,
                "bytes": engine.bytes,
                "build_seconds": engine.build_seconds,
                "parity": parity_text(report, engine),
                "speed": _speed_text(report, engine),
            }
            for engine in report.engines
        ],
    }


def engine_status(report: Report, engine: Engine) -> str:
    """Say whether an engine was run, and on what it was timed."""
    if engine.target in report.benchmarks:
        return f"timed on {text.machine(report.benchmarks[engine.target].machine)}"
    return "compared" if engine.target in report.validations else "built, not run here"


def denoiser_name(report: Report) -> str:
    """Return what the model's denoiser is called, e.g. ``unet``."""
    names = (e.component for e in report.engines if role_of(e.component) == "denoiser")
    return text.words(next(names, "denoiser"))


def parity_text(report: Report, engine: Engine) -> str:
    """Return an engine's worst error and whether it is within tolerance.

    Where the engine was not run, the error of the graph that it was built from stands for it,
    unless ONNX Runtime cannot run that.
    """
    if engine.target not in report.validations:
        error = report.graph_error(engine.graph)
        return "graph unchecked" if error is None else f"graph rel L2 {text.scientific(error)}"
    for part in report.validations[engine.target].components:
        if part.component == engine.component:
            verdict = "MISSED" if part.misses else "ok"
            return f"rel L2 {text.scientific(part.worst.rel_l2)}, {verdict}"
    return "not compared"


def run_rows(
    benchmark: Benchmark, price: config.Price | None = None
) -> list[tuple[str, list[str]]]:
    """Return what is said once of a whole run: a name, and a value for each runner."""

    def speedups(phase: str) -> list[str]:
        first = benchmark.median(benchmark.baseline, phase)
        return [text.ratio(first, benchmark.median(runner, phase)) for runner in benchmark.runners]

    memory = [benchmark.memory[runner] for runner in benchmark.runners]
    rate = [text.fixed(benchmark.images_per_second[runner]) for runner in benchmark.runners]
    rows = [
        ("speedup of the total", speedups("total")),
        ("speedup of the denoiser", speedups("denoiser_call")),
        ("images per second", rate),
        ("peak resident memory", [text.size(m.resident) for m in memory]),
    ]
    if any(m.gpu for m in memory):
        rows.append(("peak GPU memory", [text.size(m.gpu) for m in memory]))
        rows.append(("of it PyTorch’s", [text.size(m.gpu_pytorch) for m in memory]))
    if price is not None:
        costs = (
            thousand_pictures(price, benchmark.images_per_second[runner])
            for runner in benchmark.runners
        )
        rows.append((f"a thousand pictures, {price.currency}", [text.number(c) for c in costs]))
    return rows


def _speed_text(report: Report, engine: Engine) -> str:
    if engine.target not in report.benchmarks:
        return "not run here"
    role = role_of(engine.component)
    if role not in PHASES:
        return "not timed alone"
    benchmark, phase = report.benchmarks[engine.target], PHASES[role]
    ours = benchmark.median(ENGINES, phase)
    theirs = benchmark.median(benchmark.baseline, phase)
    # One phase has all encoders.
    encoders = {e.component for e in report.engines if role_of(e.component) == "encoder"}
    of = ", all encoders" if role == "encoder" and len(encoders) > 1 else ""
    return f"{text.number(ours)} ms, {text.ratio(theirs, ours)} PyTorch{of}"
