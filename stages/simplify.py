"""Simplify a graph with onnxsim and check numerically that it still computes the same.

Select it with `+onnx=unet-fp16`.

Reads   artifacts/exports/<onnx>/
Writes  artifacts/onnx/<onnx>/: model.onnx, model.onnx.data, manifest.json
        artifacts/operators/<onnx>/: the operator counts before and after, as JSON and as text
"""

from dataclasses import dataclass

from diffusion_engines import config, layout
from diffusion_engines.files import new_folder, read_manifest, write_manifest
from diffusion_engines.onnx.graph import MODEL, check_graph
from diffusion_engines.onnx.operators import graph_statistics, render
from diffusion_engines.onnx.simplify import check_same_results, simplify_graph
from diffusion_engines.onnx.statistics import Simplification, write_simplification
from diffusion_engines.onnx.versions import simplifier_versions
from diffusion_engines.progress import step
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    onnx: str
    exports: dict[str, config.ExportItem]
    simplify: config.Simplify


@stage
def main(cfg: Config) -> None:
    source = layout.export(cfg.onnx)
    with step(f"check the files of {cfg.onnx}"):
        manifest = read_manifest(source, "onnx")
    with (
        new_folder(layout.onnx(cfg.onnx)) as folder,
        new_folder(layout.operators(cfg.onnx)) as tables,
    ):
        simplify_graph(source / MODEL, folder, skipped_optimizers=cfg.simplify.skipped_optimizers)
        with step("check the graph"):
            check_graph(folder / MODEL, opset=manifest["opset"], writer="onnxsim")
        error = check_same_results(
            source / MODEL,
            folder / MODEL,
            seed=cfg.simplify.seed,
            allowed=cfg.simplify.rel_l2[cfg.exports[cfg.onnx].precision],
        )
        before, after = graph_statistics(source / MODEL), graph_statistics(folder / MODEL)
        found = Simplification(before, after)
        write_simplification(found, tables)
        table = render(found, cfg.onnx)
        (tables / "operators.txt").write_text(table)
        print(table)
        info = {key: value for key, value in manifest.items() if key not in ("files", "kind")}
        info["versions"] |= simplifier_versions()
        info["simplify_rel_l2"] = error
        write_manifest(folder, "onnx", info)


if __name__ == "__main__":
    main()
