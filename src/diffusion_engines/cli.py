"""``diffusion-engines``: what is no stage of the pipeline, as subcommands. ``make`` calls it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_engines.ends import one_line_at_the_end

# The status of `plan` where something is to do; a failure's is 1.
TO_DO = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; a failure that a person can mend ends with its message and status 1."""
    with one_line_at_the_end("diffusion-engines"):
        try:
            options = _parser().parse_args(arguments)
        except SystemExit as stop:  # of argparse, whose 2 would say that something is to do
            sys.exit(1 if stop.code == TO_DO else stop.code)
        options.run(options)


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
    publish = add("publish", _publish, "put the proven engines of the fleet into a release")
    publish.add_argument("folder", nargs="?", type=Path, default=Path("release"), help="release/")
    profiles = add("profiles", _profiles, "say which engines of a release this machine takes")
    profiles.add_argument("folder", nargs="?", type=Path, default=Path("release"), help="release/")
    verify = add("verify", _verify, "hash DVC's cache again, and mend what is damaged")
    verify.add_argument("--all", action="store_true", help="not only what dvc.lock names")
    verify.add_argument("--remote", action="store_true", help="also upload what the remote lacks")
    add("pull", _pull, "restore from the remote what dvc.lock names, each object hashed")
    add("push", _push, "bring to the remote what it lacks of dvc.lock, each object asked for")
    diff = add("diff", _diff, "two revisions side by side, and what is more than noise")
    revision = "of git, or `workspace`; REVISION:TARGET compares one target with another"
    diff.add_argument("before", nargs="?", default="HEAD", help=f"{revision}; HEAD")
    diff.add_argument("after", nargs="?", default="workspace", help="likewise; workspace")
    diff.add_argument("--fail-on", choices=["regression"], help="end with an error at one, for CI")
    diff.add_argument(
        "--folder", type=Path, default=Path("artifacts/diff"), help="for the page; artifacts/diff"
    )
    doctor = add("doctor", _doctor, "find out what of TensorRT works on this machine; a page of it")
    doctor.add_argument(
        "folder", nargs="?", type=Path, default=Path("artifacts/doctor"), help="for the page"
    )
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


def _publish(options: argparse.Namespace) -> None:
    from diffusion_engines.layout import Workspace
    from diffusion_engines.release.publishing import publish
    from diffusion_engines.yaml_files import PARAMS, read_mapping

    targets = sorted(read_mapping(PARAMS)["fleet"])
    release, refused = publish(Workspace(), targets, options.folder)
    for profile in release.profiles:
        print(f"{profile.target}: published, {profile.bytes / 1e6:,.1f} MB")
    for target, reason in refused.items():
        print(f"{target}: not published. {reason}")
    if refused:
        sys.exit(f"{options.folder} lacks {', '.join(refused)}")


def _profiles(options: argparse.Namespace) -> None:
    from diffusion_engines.release.listing import print_profiles

    print_profiles(options.folder)


def _verify(options: argparse.Namespace) -> None:
    from diffusion_engines.verify import print_report, verify_cache

    report = verify_cache(Path.cwd(), everything=options.all, remote=options.remote)
    print_report(report)
    sys.exit(bool(report.left or report.remote))


def _pull(options: argparse.Namespace) -> None:
    from diffusion_engines.remotes.commands import pull_outputs

    done = pull_outputs(Path.cwd())
    if done.damaged or done.missing:
        sys.exit("`make repro` makes again what is missing")


def _push(options: argparse.Namespace) -> None:
    from diffusion_engines.remotes.commands import push_outputs

    if push_outputs(Path.cwd()).missing:
        sys.exit("`make repro` makes again what is missing; then push again")


def _diff(options: argparse.Namespace) -> None:
    from diffusion_engines.comparison.showing import compare

    worse = compare(Path.cwd(), options.before, options.after, options.folder)
    if worse and options.fail_on:
        names = (
            " ".join((one.target, one.component, one.what)).replace("  ", " ") for one in worse
        )
        sys.exit(f"worse: {', '.join(names)}")


def _doctor(options: argparse.Namespace) -> None:
    from diffusion_engines.doctor.examination import examine

    failed = examine(Path.cwd(), options.folder)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _merge_lock(options: argparse.Namespace) -> None:
    from diffusion_engines.merging import LOCK, merge_lock

    again = merge_lock(Path.cwd())
    print(f"{LOCK} is merged. `dvc repro --pull` makes anew: {', '.join(again) or 'nothing'}")


if __name__ == "__main__":
    main()
