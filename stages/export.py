"""Write one component in one precision as an ONNX graph, patched where the exporter needs it.

Select it with `+graph=unet-fp16`.

Reads   artifacts/weights/<folder of the component>/, artifacts/weights/model_index.json
Writes  artifacts/exports/<graph>/: model.onnx, model.onnx.data, manifest.json
"""

from dataclasses import dataclass

from diffusion_engines import config, manifests
from diffusion_engines.families import family_of
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.onnx.export import export_module
from diffusion_engines.onnx.versions import exporter_versions
from diffusion_engines.params import key, param
from diffusion_engines.progress import step
from diffusion_engines.runtime.networks import load_network, read_config
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    graph: str = key("exports")
    item: config.Graph = param("graphs.${key}")
    export: config.Export = param("export")
    image: config.Image = param("image")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    item = cfg.item
    component = family_of(workspace.weights).component(item.component)
    weights = workspace.weights / item.weights
    with step(f"load {cfg.graph}"):
        origin = manifests.read(weights, manifests.Weights)
        architecture = read_config(component, weights)
        module = load_network(component, weights, item.precision)
    inputs = component.inputs(architecture, cfg.image, cfg.export.dynamic)
    with new_folder(workspace.export(cfg.graph)) as folder:
        with step(f"export with {cfg.export.exporter}, opset {cfg.export.opset}"):
            export_module(
                module,
                inputs,
                folder,
                precision=item.precision,
                exporter=cfg.export.exporter,
                opset=cfg.export.opset,
                patches=cfg.export.patches,
                outputs=[value.name for value in component.outputs],
                vocabulary=architecture.get("vocab_size", 0),
            )
        manifest = manifests.graph_from_weights(
            origin,
            name=cfg.graph,
            component=item.component,
            precision=item.precision,
            inputs=inputs,
            outputs=component.outputs,
            guidance=cfg.image.guidance,
            exporter=cfg.export.exporter,
            opset=cfg.export.opset,
            patches=cfg.export.patches,
            versions=exporter_versions(),
        )
        manifests.write(folder, manifest)


if __name__ == "__main__":
    main()
