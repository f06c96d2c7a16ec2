"""Build the engine of one component for one target.

Select it with `+engine=rtx-unet`.

Reads   artifacts/onnx/<graph>/, artifacts/structures/<graph>/ for stripped plans, or
        artifacts/programs/<target>/<component>/;
        artifacts/fingerprints/<target>.json, and artifacts/timing/<target>/ if it is there: not a
        dependency, for it only saves time
Writes  artifacts/engines/<target>/<component>/: the engine and manifest.json; of TensorRT also
        layers.json and timing.cache
        artifacts/logs/build/<engine>/: what the builder printed
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_engines import config, manifests
from diffusion_engines.backends import backend, check_precision
from diffusion_engines.backends.base import GRAPH_FILES, Graph
from diffusion_engines.backends.targets import Target
from diffusion_engines.backends.timing import find_timing_cache
from diffusion_engines.files import new_folder
from diffusion_engines.layout import Workspace
from diffusion_engines.params import key, param
from diffusion_engines.progress import step
from diffusion_engines.stage import stage


@dataclass(frozen=True)
class Config:
    engine: str = key("engines")
    item: config.Engine = param("engines.${key}")
    target: Target = param("targets.${item.target}")


@stage
def main(cfg: Config) -> None:
    workspace = Workspace()
    engine, target = cfg.item, cfg.target
    module = backend(target.backend)
    check_precision(cfg.engine, engine.precision, target.backend)
    # Raises where this machine cannot build for the target and only has the record of one.
    fingerprint = module.fingerprint(target)
    source = Path(engine.graph_folder)
    kind: type[manifests.Graph] = manifests.Graph
    if module.graph_format == "exported_program":
        kind = manifests.Program
    elif module.builds_without_weights(target):
        kind = manifests.Structure
    with step(f"check the files of {engine.graph}"):
        manifest = manifests.read(source, kind)
    graph = Graph(
        name=engine.graph,
        component=engine.component,
        precision=engine.precision,
        format=module.graph_format,
        path=source / GRAPH_FILES[module.graph_format],
        inputs=manifest.inputs,
    )
    cache = None
    if module.timing(target):
        cache = find_timing_cache(workspace.timing(engine.target), engine.component, fingerprint)
    with new_folder(workspace.engine(engine.target, engine.component)) as folder:
        with step(f"build {cfg.engine} with {target.backend}"):
            result = module.build(graph, folder, target, cache)
        log = workspace.log("build", cfg.engine)
        log.mkdir(parents=True, exist_ok=True)
        (log / "build.log").write_text(result.log + "\n")
        built = manifests.engine_from_graph(
            manifest,
            name=cfg.engine,
            target=engine.target,
            backend=target.backend,
            builder=result.builder,
            settings=asdict(target),
            fingerprint=fingerprint,
            engine=result.engine,
            layers=result.layers,
            dtypes=result.precisions,
        )
        manifests.write(folder, built)


if __name__ == "__main__":
    main()
