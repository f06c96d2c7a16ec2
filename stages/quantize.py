"""Make an INT8, FP8 or mixed-precision graph of an export, calibrated on the recorded reference.

Select it with `+graph=unet-int8`. What it costs is measured in ONNX Runtime at every recorded call,
beside its source, and written first; a missed tolerance fails after.

Reads   artifacts/onnx/<source>/, artifacts/reference/<component>.safetensors
Writes  artifacts/onnx/<graph>/: model.onnx, model.onnx.data, manifest.json
        artifacts/quantization/<graph>/: the errors of every call, and which layers are quantized
        artifacts/metrics/quantize/<graph>.json
        artifacts/logs/quantize/<graph>/: what ModelOpt printed
"""

from dataclasses import asdict, dataclass, replace

from diffusion_engines import config, manifests
from diffusion_engines.errors import GateError
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.onnx.graph import MODEL, check_graph
from diffusion_engines.onnx.quantize import lower_precision, opset_on_disk, typed_inputs
from diffusion_engines.onnx.versions import quantizer_versions
from diffusion_engines.params import key, param
from diffusion_engines.parity.graphs import compare_graphs
from diffusion_engines.parity.results import Quantization, write_quantization
from diffusion_engines.progress import step
from diffusion_engines.runtime.calls import recorded_calls, spread
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    graph: str = key("quantized")
    item: config.Graph = param("graphs.${key}")
    settings: config.EightBit | config.Mixed = param("quantize.${item.precision}")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    item, settings = cfg.item, cfg.settings
    assert item.source is not None  # of this table, each has one
    source, recorded = workspace.onnx(item.source), f"{item.component}.safetensors"
    with step(f"check the files of {item.source}"):
        manifest = manifests.read(source, manifests.Graph)
        manifests.read(workspace.reference, manifests.Reference, only=(recorded,))
    calls = recorded_calls(workspace.reference / recorded)
    chosen = spread([inputs for inputs, _ in calls], settings.calls)
    with (
        new_folder(workspace.onnx(cfg.graph)) as folder,
        new_folder(workspace.quantization(cfg.graph)) as tables,
    ):
        with step(f"{item.precision}, from {len(chosen)} of {len(calls)} calls"):
            layers = lower_precision(
                source,
                folder,
                chosen,
                item.component,
                item.precision,
                settings,
                workspace.log("quantize", cfg.graph),
            )
        with step("check the graph"):
            opset = opset_on_disk(folder / MODEL)
            check_graph(folder / MODEL, opset=opset, writer="ModelOpt")
        parity = compare_graphs(
            source / MODEL, folder / MODEL, calls, names=(item.source, cfg.graph)
        )
        worst = parity.worst()
        print(
            f"  relative L2 error at the worst call: {worst['rel_l2']:.2e} "
            f"({item.source}: {worst['source_rel_l2']:.2e}; allowed {settings.rel_l2:.0e})"
        )
        result = Quantization(
            name=cfg.graph,
            source=item.source,
            calls=len(chosen),
            allowed=settings.rel_l2,
            bytes=sum(file.stat().st_size for file in folder.iterdir()),
            lowered=layers.lowered,
            kept=layers.kept,
            parity=parity,
            misses=tuple(parity.misses(settings.rel_l2)),
        )
        write_quantization(result, tables, workspace.metrics("quantize", cfg.graph))
        quantized = replace(
            manifest,
            name=cfg.graph,
            precision=item.precision,
            opset=opset,
            inputs=typed_inputs(manifest.inputs, manifest.precision),
            compared=True,
            versions={**manifest.versions, **quantizer_versions()},
            quantization={
                "settings": asdict(settings),
                "source": item.source,
                "calls": len(chosen),
                **asdict(layers),
                **worst,
            },
        )
        manifests.write(folder, quantized)
    if misses := result.misses:
        raise GateError(
            f"{cfg.graph} misses its tolerance at {len(misses)} of {len(calls)} calls:\n  - "
            + "\n  - ".join(misses[:10]),
            fix=f"name the layers at fault in quantize.{item.precision}.kept, calibrate on more "
            f"calls,\nor widen quantize.{item.precision}.rel_l2 (conf/quantize/); the measurements "
            f"are in\n{workspace.quantization(cfg.graph)}",
        )


if __name__ == "__main__":
    main()
