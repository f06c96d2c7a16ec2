"""The runner of every script in ``stages/``: params.yaml to typed config to ``main``.

A stage declares what it reads in a dataclass ``Config`` (``params.py``): keys of params.yaml, and
an item such as ``engine``, given on the command line as ``engine=rtx-unet``.

Hydra's command line works on every stage: overrides, ``--help``, ``--cfg job``.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from diffusion_engines.arguments import hydra_arguments
from diffusion_engines.config import SECTIONS
from diffusion_engines.dvc_cache import refuse_links
from diffusion_engines.ends import error_with_remedy, one_line_at_the_end
from diffusion_engines.environments import environment_here, write_environment
from diffusion_engines.errors import ConfigError, DiffusionEnginesError
from diffusion_engines.failures import (
    Failure,
    failure_from_exception,
    remove_failure,
    write_failure,
)
from diffusion_engines.files import write_json
from diffusion_engines.layout import Workspace
from diffusion_engines.params import config_from_mapping, differences, selector, slices, tracked
from diffusion_engines.processes import death_with_parent
from diffusion_engines.progress import LOG
from diffusion_engines.runs import started_by_dvc
from diffusion_engines.turns import TURNS, runs_alone, turn
from diffusion_engines.why import WHY, Run, reasons_of, run_file, write_run
from diffusion_engines.yaml_files import PARAMS, read_mapping

# The environment variable that names the folder in which a stage leaves why it failed.
FAILURES = "DIFFUSION_ENGINES_FAILURES"

_HYDRA_OVERRIDES = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra/help=stage",
]


def stage(main: Callable[[Any], None]) -> Callable[[], None]:
    """Make a script of ``main``, whose one argument is annotated with the stage's ``Config``."""

    def run() -> None:
        atexit.register(_skip_last_collection)
        script = Path(sys.argv[0]).resolve()
        os.chdir(script.parent.parent)
        under_dvc = "DVC_STAGE" in os.environ
        if under_dvc:
            _end_with_dvc()
        with one_line_at_the_end(script.stem):
            _run_script(main, script, under_dvc)

    return run


def _run_script(main: Callable[[Any], None], script: Path, under_dvc: bool) -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig

    params = read_mapping(PARAMS)
    description = sys.modules[main.__module__].__doc__ or ""
    ConfigStore.instance().store(
        group="hydra/help", name="stage", node=_help_node(script, description)
    )
    sys.argv[1:] = _arguments(sys.argv[1:], main, script.stem)
    sys.argv[1:1] = _HYDRA_OVERRIDES  # before options such as `--cfg job`

    recorded = _plain(params) if under_dvc else None

    def run_with_config(config: DictConfig) -> None:
        _run(main, script.stem, _plain(config), recorded)

    # As a node, and with a search path that has no folders: every folder would be a config
    # group. Beside params.yaml there are .venv and artifacts, which `--help` would list for a
    # minute and a half; a folder here of a selector's name would be what it selects from.
    ConfigStore.instance().store(name="params", node=params)
    hydra.main(version_base="1.3", config_path=str(script.parent), config_name="params")(
        run_with_config
    )()


def _arguments(arguments: list[str], main: Callable[[Any], None], name: str) -> list[str]:
    config_class = typing.get_type_hints(main)["cfg"]
    section = SECTIONS.get(name) if name in tracked(config_class) else None
    picked = selector(config_class)
    return hydra_arguments(arguments, {picked[0]} if picked else set(), name, section)


def _run(
    main: Callable[[Any], None],
    name: str,
    config: dict[str, Any],
    recorded: dict[str, Any] | None = None,
) -> None:
    """Run a stage; end the process with a message where it fails in a way that a person can mend.

    Args:
        main: of the stage.
        name: of the stage.
        config: its parameters, with selectors and the command line's overrides.
        recorded: params.yaml as it was loaded, where DVC will record the result under it.
    """
    config_class = typing.get_type_hints(main)["cfg"]
    failures, dvc_stage = os.environ.get(FAILURES), os.environ.get("DVC_STAGE")
    blank = Failure(dvc_stage or name, _target_in(config))
    if failures:
        write_failure(Path(failures), blank)  # what stays if this process is killed
    with one_line_at_the_end(name):
        try:
            if recorded is not None:
                refuse_links(Path())
            reasons = _reasons(dvc_stage)
            cfg, key = config_from_mapping(config_class, config)
            folder = os.environ.get(TURNS)
            alone = folder is not None and runs_alone(name, config)
            with turn(Path(folder) if folder else None, alone=alone) as waited:
                main(cfg)
            if LOG.steps:
                log = Workspace().log(name, key or None)
                write_json(log / "resources.json", LOG.steps)
                if dvc_stage:
                    write_environment(log, environment_here(Path()))
                    seconds = round(_seconds_since_start() - waited, 1)
                    write_run(run_file(dvc_stage, Path()), Run(seconds, reasons))
            if recorded is not None:
                _check_unchanged(config_class, recorded, config)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except Exception as error:
            known = error_with_remedy(error)
            if failures:
                write_failure(Path(failures), failure_from_exception(blank, known or error))
            if known is None:
                raise
            if not isinstance(error, (DiffusionEnginesError, OSError, MemoryError, Warning)):
                traceback.print_exc()  # of a library whose text we read a cause in
            # Who collects failures says the rest at the end, once.
            sys.exit(f"\n{name} failed: {known.problem if failures else known}")
    if failures:
        remove_failure(Path(failures), blank)


def _reasons(dvc_stage: str | None) -> list[str]:
    """Return and print why the stage runs, where who started dvc has left that for it."""
    path = os.environ.get(WHY)
    if dvc_stage is None or path is None:
        return []
    reasons = reasons_of(dvc_stage, Path(path), Path())
    for number, reason in enumerate(reasons):
        print(f"  {'because' if number == 0 else '    and'} {reason}", flush=True)
    return reasons


def _seconds_since_start() -> float:
    """Return for how long this process has been there: imports take as long as a small build."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _target_in(config: dict[str, Any]) -> str | None:
    """Return the target that a stage works for, if its selector says so."""
    if "engine" in config:
        engine = config.get("engines", {}).get(config["engine"], {})
        return typing.cast("str | None", engine.get("target"))
    return config.get("target")


def _check_unchanged(
    config_class: type[Any], recorded: dict[str, Any], config: dict[str, Any]
) -> None:
    """Compare the keys that a stage reads with params.yaml now, where DVC is about to read it.

    DVC hashes parameters after a stage has ended, so it would record the result under others than
    those that it was made with: in dvc.lock, and in the cache that other machines restore from.

    Args:
        config_class: of the stage.
        recorded: params.yaml as it was when the stage started.
        config: what the stage was given, its selector included.

    Raises:
        ConfigError: a value changed.
    """
    picked = selector(config_class)
    chosen = {picked[0]: config[picked[0]]} if picked else {}
    now = _plain(read_mapping(PARAMS))
    before = slices(config_class, recorded | chosen)
    try:
        after = slices(config_class, now | chosen)
    except ConfigError:  # the item is not there any more
        after = {}
    changes = [
        change
        for key in dict.fromkeys([*before, *after])
        for change in differences(key, before.get(key), after.get(key))
    ]
    if changes:
        more = f"\nand {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ConfigError(
            "params.yaml changed while this stage ran; its result belongs to the old parameters",
            expected="the parameters that it started with",
            found="\n".join(map(str, changes[:5])) + more,
            fix="run it again, and leave params.yaml alone until it has ended: another set of\n"
            "parameters meanwhile needs a second clone, or `dvc exp run --queue` afterwards",
        )


def _help_node(script: Path, description: str) -> dict[str, str]:
    template = (
        f"{description.strip()}\n\n"
        f"Usage:  python stages/{script.name} [overrides]\n"
        "Every key of params.yaml can be overridden (Hydra's grammar); `--cfg job` prints them.\n"
    )
    if is_dataclass(section := SECTIONS.get(script.stem)):
        key = fields(section)[-1].name
        template += f"Those of its own section need no prefix: {key}=… is {script.stem}.{key}=….\n"
    return {"app_name": script.stem, "header": "", "footer": "", "template": template}


def _end_with_dvc() -> None:
    """End this process when dvc, its parent, is killed. A stage run by hand goes on.

    The commands in dvc.yaml begin with `exec`: some shells (dash) would stay in between otherwise.
    """
    if (ask := death_with_parent()) is None:
        return
    ask()
    if not started_by_dvc(Path.cwd()):  # dvc died while this script was loading
        sys.exit("dvc was killed")


def _skip_last_collection() -> None:
    """Spare a process that ends Python's last collection, a walk over all that was imported.

    It takes up to a second after torch, diffusers and transformers. But onnxsim's extension
    (nanobind) prints twenty lines about what was not collected when the interpreter ends.
    """
    if "onnxsim" not in sys.modules:
        gc.freeze()


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return typing.cast(dict[str, Any], OmegaConf.to_container(config))
