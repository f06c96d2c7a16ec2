"""``diffusion-engines``: what is no stage of the pipeline, as subcommands. ``make`` calls it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_engines.errors import DiffusionEnginesError

# The status of `plan` where something is to do; a failure's is 1.
TO_DO = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; a failure that a person can mend ends with its message and status 1."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # of argparse, whose 2 would say that something is to do
        sys.exit(1 if stop.code == TO_DO else stop.code)
    try:
        options.run(options)
    except DiffusionEnginesError as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusion-engines",
        description="Inference engines of diffusion models for a fleet of GPUs; "
        "to be called in the folder of the repository.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: object, help_: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=help_)
        command.set_defaults(run=run)
        return command

    overrides = "Hydra's overrides, e.g. model=sd14 fleet=rtx40 export.opset=20"
    repro = add("repro", _repro, "compose conf/, run `dvc repro`, and say what came of it")
    repro.add_argument("overrides", nargs="*", help=overrides)
    plan = add("plan", _plan, "say what `repro` would run, restore and leave alone, and why")
    plan.add_argument("overrides", nargs="*", help=overrides)
    plan.add_argument("--pull", action="store_true", help="as `dvc repro --pull`: ask the remote")
    plan.add_argument("--json", action="store_true", help="for programs")
    compose = add("compose", _compose, "compose conf/ into params.yaml")
    compose.add_argument("overrides", nargs="*", help=overrides)
    measure = add("measure", _measure, "time targets on this machine, whose record replaces theirs")
    measure.add_argument("targets", nargs="+", metavar="TARGET", help="of the section `measure`")
    add("experiments", _experiments, "DVC's experiments: what differs, and the metrics")
    check = add("check-bundle", _check_bundle, "say whether bundles can be loaded on this machine")
    check.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a bundle")
    add("merge-lock", _merge_lock, "resolve git's conflict in dvc.lock, stage by stage")
    return parser


def _repro(options: argparse.Namespace) -> None:
    from diffusion_engines.repro import reproduce

    reproduce(Path.cwd(), overrides=options.overrides)


def _plan(options: argparse.Namespace) -> None:
    from diffusion_engines.plan.planning import plan_run
    from diffusion_engines.plan.printing import json_from_plan, print_plan
    from diffusion_engines.wording import console

    plan = plan_run(Path.cwd(), options.overrides, pull=options.pull)
    if options.json:
        print(json_from_plan(plan))
    else:
        print_plan(plan, console())
    if not plan.is_idle:
        sys.exit(TO_DO)


def _compose(options: argparse.Namespace) -> None:
    from diffusion_engines.compose import compose_params
    from diffusion_engines.runs import composition

    root = Path.cwd()
    with composition(root):
        changed = compose_params(options.overrides, root)
    print(f"params.yaml: {'composed anew' if changed else 'up to date'}")


def _measure(options: argparse.Namespace) -> None:
    from diffusion_engines.repro import measure

    measure(Path.cwd(), options.targets)


def _experiments(options: argparse.Namespace) -> None:
    from diffusion_engines.experiments import print_experiments

    print_experiments(Path.cwd())


def _check_bundle(options: argparse.Namespace) -> None:
    from diffusion_engines.runtime.bundle import check_bundle

    for folder in options.folders:
        manifest = check_bundle(folder)
        print(f"{folder}: {manifest.name} ({manifest.builder}) can be loaded here")


def _merge_lock(options: argparse.Namespace) -> None:
    from diffusion_engines.merging import LOCK, merge_lock

    again = merge_lock(Path.cwd())
    print(f"{LOCK} is merged. `dvc repro --pull` makes anew: {', '.join(again) or 'nothing'}")


if __name__ == "__main__":
    main()
