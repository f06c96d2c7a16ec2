"""Simplify a graph with onnxsim and check numerically that it still computes what PyTorch does.

Select it with `+graph=unet-fp16`. The graph is compared with the export, and with the recorded
reference call by call, so that no engine rests on a graph that nobody has compared; where ONNX
Runtime cannot run it (bf16), its manifest says so. Measurements come first; a miss fails after.

Reads   artifacts/exports/<graph>/, artifacts/reference/<component>.safetensors
Writes  artifacts/onnx/<graph>/: model.onnx, model.onnx.data, manifest.json
        artifacts/structures/<graph>/: the same model.onnx, without the weights; equal for all
        fine-tunes of a network, so that what is built from it is built once
        artifacts/operators/<graph>/: the operator counts before and after, as JSON and as text
        artifacts/parity/<graph>/: the distance from the reference at every recorded call
"""

from dataclasses import dataclass, replace

from diffusion_engines import config, manifests
from diffusion_engines.errors import GateError
from diffusion_engines.files import MANIFEST, copy_files, new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.onnx.graph import DATA, MODEL, check_graph
from diffusion_engines.onnx.operators import graph_statistics, render
from diffusion_engines.onnx.simplify import check_same_results, simplify_graph
from diffusion_engines.onnx.statistics import Simplification, write_simplification
from diffusion_engines.onnx.versions import simplifier_versions
from diffusion_engines.params import key, param
from diffusion_engines.parity.gates import misses_of_component
from diffusion_engines.parity.graphs import graph_differences
from diffusion_engines.parity.results import GraphCheck, write_graph_check
from diffusion_engines.progress import step
from diffusion_engines.runtime.calls import recorded_calls, spread
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    graph: str = key("exports")
    item: config.Graph = param("graphs.${key}")
    simplify: config.Simplify = param("simplify")
    gate: config.Gate = param("validate.components.${item.component}.${item.precision}")


@stage
def main(cfg: Config) -> None:
    workspace, name = Workspace(), cfg.graph
    source, recorded = workspace.export(name), f"{cfg.item.component}.safetensors"
    with step(f"check the files of {name}"):
        manifest = manifests.read(source, manifests.Graph)
        manifests.read(workspace.reference, manifests.Reference, only=(recorded,))
    calls = recorded_calls(workspace.reference / recorded)
    with (
        new_folder(workspace.onnx(name)) as folder,
        new_folder(workspace.structure(name)) as structure,
        new_folder(workspace.operators(name)) as tables,
        new_folder(workspace.parity(name)) as parity,
    ):
        simplify_graph(source / MODEL, folder, skipped_optimizers=cfg.simplify.skipped_optimizers)
        with step("check the graph"):
            check_graph(folder / MODEL, opset=manifest.opset, writer="onnxsim")
        error = check_same_results(
            source / MODEL,
            folder / MODEL,
            allowed=cfg.simplify.rel_l2[cfg.item.precision],
            inputs=calls[len(calls) // 2][0],
        )
        statistics = Simplification(
            graph_statistics(source / MODEL), graph_statistics(folder / MODEL)
        )
        write_simplification(statistics, tables)
        table = render(statistics, name)
        (tables / "operators.txt").write_text(table)
        print(table)
        compared = error is not None  # else ONNX Runtime cannot run it
        chosen = spread(calls, cfg.simplify.calls) if compared else []
        found = graph_differences(folder / MODEL, chosen, name)
        misses = misses_of_component(name, cfg.gate, found)
        write_graph_check(GraphCheck(name, cfg.gate, found, tuple(misses)), parity)
        simplified = replace(
            manifest,
            versions={**manifest.versions, **simplifier_versions()},
            simplify_rel_l2=error,
            # Not how far: a new reference must not make the graph, and its engines, another one.
            compared=compared,
        )
        manifests.write(folder, simplified)
        copy_files(folder, structure, skip=(MANIFEST, DATA))
        manifests.write(structure, manifests.structure_of_graph(simplified))
    if misses:
        raise GateError(
            f"the graph {name} computes something else than PyTorch; it misses {len(misses)} "
            "tolerance(s):\n  - " + "\n  - ".join(misses[:10]),
            fix="use another export.opset or exporter (conf/export/). If the precision is known\n"
            "to cost this much, widen its tolerance in conf/validate/; the measurements are in\n"
            f"{workspace.parity(name)}",
        )


if __name__ == "__main__":
    main()
