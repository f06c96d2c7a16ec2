"""``diffusion-engines``: what is no stage of the pipeline, as subcommands. ``make`` calls it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
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

    for topic in (_add_runs, _add_sweeps, _add_releases, _add_looks):
        topic(add)
    return parser


Add = Callable[[str, object, str], argparse.ArgumentParser]


def _add_runs(add: Add) -> None:
    overrides = "Hydra's overrides, e.g. model=sd14 fleet=rtx40 export.opset=20"
    repro = add("repro", _repro, "compose conf/, run `dvc repro`, and say what came of it")
    repro.add_argument("overrides", nargs="*", help=overrides)
    plan = add("plan", _plan, "say what `repro` would run, restore and leave alone, and why")
    plan.add_argument("overrides", nargs="*", help=overrides)
    plan.add_argument("--pull", action="store_true", help="as `dvc repro --pull`: ask the remote")
    plan.add_argument("--json", action="store_true", help="for programs")
    fleet = add(
        "fleet", _fleet, "build every target of the fleet that is missing, here or on Slurm"
    )
    fleet.add_argument("overrides", nargs="*", help=f"{overrides}; launcher=slurm, jobs=2")
    fleet.add_argument("--pull", action="store_true", help="as `dvc repro --pull`")
    compose = add("compose", _compose, "compose conf/ into params.yaml")
    compose.add_argument("overrides", nargs="*", help=overrides)
    measure = add("measure", _measure, "time targets on this machine, whose record replaces theirs")
    measure.add_argument("targets", nargs="+", metavar="TARGET", help="of the section `measure`")
    add("merge-lock", _merge_lock, "resolve git's conflict in dvc.lock, stage by stage")


def _add_sweeps(add: Add) -> None:
    add("experiments", _experiments, "DVC's experiments: what differs, and the metrics")
    sweep = add("sweep", _sweep, "run the points of a sweep to the end, and say which to keep")
    sweep.add_argument("sweep", metavar="SWEEP", help="a file of conf/sweep/, such as precision")
    sweep.add_argument(
        "overrides", nargs="*", help="Hydra's, in place of the file's; `key=1,2` sweeps"
    )
    sweep.add_argument("--jobs", type=_positive, default=1, help="points at a time; 1")
    sweep.add_argument("--target", help="whose measurements are compared; the measured one")
    sweep.add_argument("--name", help="of its folder and experiments; that of the file")
    pick = add("pick", _pick, "write a point of a sweep, or an experiment, into conf/")
    pick.add_argument(
        "point",
        nargs="?",
        default="pick=fastest",
        metavar="REVISION|pick=RULE",
        help="an experiment, a revision, or a rule of conf/pick/; pick=fastest",
    )
    pick.add_argument("--sweep", help="of which a rule picks; the one that was run last")


def _add_releases(add: Add) -> None:
    check = add("check-bundle", _check_bundle, "say whether bundles can be loaded on this machine")
    check.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a bundle")
    again = add("reproduce", _reproduce, "build a bundle again, of its own commit, and compare")
    again.add_argument("bundle", type=Path, metavar="BUNDLE", help="its folder, also in a release")
    again.add_argument(
        "--any-versions", action="store_true", help="also where libraries are of other versions"
    )
    publish = add("publish", _publish, "put the proven engines of the fleet into a release")
    publish.add_argument("folder", nargs="?", type=Path, default=Path("release"), help="release/")
    profiles = add("profiles", _profiles, "say which engines of a release this machine takes")
    profiles.add_argument("folder", nargs="?", type=Path, default=Path("release"), help="release/")
    triton = add("export-triton", _export_triton, "a release as a model repository of Triton")
    triton.add_argument("release", nargs="?", type=Path, default=Path("release"), help="release/")
    triton.add_argument(
        "folder", nargs="?", type=Path, default=Path("release-triton"), help="release-triton/"
    )
    for name, run, help_, places in (
        ("export-oci", _export_oci, "a release as an OCI layout", ("release", "release-oci")),
        ("import-oci", _import_oci, "the release of an OCI layout", ("release-oci", "release")),
    ):
        command = add(name, run, help_)
        for place, folder in zip(("source", "folder"), places, strict=True):
            command.add_argument(
                place, nargs="?", type=Path, default=Path(folder), help=f"{folder}/"
            )
        command.add_argument("--tag", default="latest", help="of the release in it; latest")


def _add_looks(add: Add) -> None:
    verify = add("verify", _verify, "hash DVC's cache again, and mend what is damaged")
    verify.add_argument("--all", action="store_true", help="not only what dvc.lock names")
    verify.add_argument("--remote", action="store_true", help="also upload what the remote lacks")
    gc = add("gc", _gc, "drop what nobody needs of DVC's cache, after saying what and asking")
    gc.add_argument("--remote", action="store_true", help="of the default remote instead")
    gc.add_argument("--budget", metavar="SIZE", help="200GB: the oldest first, until under it")
    gc.add_argument("--grace", type=float, metavar="HOURS", help="what is younger stays; 24")
    gc.add_argument("--yes", action="store_true", help="do not ask")
    lease = add("lease", _lease, "say beside the cache what this clone needs, so that gc keeps it")
    lease.add_argument("--remote", action="store_true", help="on the default remote instead")
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
    auto = add("quantize-auto", _quantize_auto, "find the layers of a graph that can have 8 bits")
    auto.add_argument("graph", metavar="GRAPH", help="such as unet-int8")
    auto.add_argument("--minutes", type=float, default=60, help="then it stops, to be gone on with")
    auto.add_argument("--rel-l2", type=float, help="stricter than the gates of conf/validate/")
    auto.add_argument("--depth", type=int, help="levels of modules that tell groups apart")
    auto.add_argument("--option", help="of conf/quantize/, to be written; the graph's name")
    auto.add_argument("--base", default="default", help="the option that it changes; default")
    doctor = add("doctor", _doctor, "find out what of TensorRT works on this machine; a page of it")
    doctor.add_argument(
        "folder", nargs="?", type=Path, default=Path("artifacts/doctor"), help="for the page"
    )


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


def _fleet(options: argparse.Namespace) -> None:
    from diffusion_engines.fleet.running import run_fleet

    run_fleet(Path.cwd(), options.overrides, pull=options.pull)


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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return number


def _sweep(options: argparse.Namespace) -> None:
    from diffusion_engines.sweeps.sweeping import sweep

    well = sweep(
        Path.cwd(),
        options.sweep,
        options.overrides,
        jobs=options.jobs,
        target=options.target,
        name=options.name,
    )
    if not well:
        sys.exit("not every point is built and within the gates: the table says why")


def _pick(options: argparse.Namespace) -> None:
    from diffusion_engines.sweeps.picking import pick_revision, pick_rule
    from diffusion_engines.yaml_files import PARAMS

    group, _, rule = options.point.partition("=")
    if group == "pick" and rule:
        picked = pick_rule(Path.cwd(), rule, options.sweep)
    else:
        picked = pick_revision(Path.cwd(), options.point)
    print(f"{picked.name}: {picked.why}")
    for change in picked.changes:
        print(f"  {change}")
    if picked.files:
        print(f"written: {', '.join(map(str, picked.files))}, {PARAMS}; `git diff` shows it")
    else:
        print("conf/ says so already")


def _check_bundle(options: argparse.Namespace) -> None:
    from diffusion_engines.runtime.bundle import check_bundle

    for folder in options.folders:
        manifest = check_bundle(folder)
        print(f"{folder}: {manifest.name} ({manifest.builder}) can be loaded here")


def _reproduce(options: argparse.Namespace) -> None:
    from diffusion_engines.reproduction.reproducing import reproduce_bundle

    found = reproduce_bundle(Path.cwd(), options.bundle, any_versions=options.any_versions)
    if not found.is_same:
        sys.exit(f"{options.bundle} could not be made again")


def _publish(options: argparse.Namespace) -> None:
    from diffusion_engines.layout import Workspace
    from diffusion_engines.release.publishing import publish
    from diffusion_engines.yaml_files import PARAMS, read_mapping

    fleet = read_mapping(PARAMS)["fleet"]
    release, refused = publish(Workspace(), sorted(fleet), options.folder)
    for profile in release.profiles:
        print(f"{profile.target}: published, {(profile.bytes or 0) / 1e6:,.1f} MB")
    for target, reason in refused.items():
        print(f"{target}: not published. {reason}")
    # A fleet is whole without an alternative: what it is one to is there.
    if lacking := [name for name in refused if fleet[name].get("alternative_to") not in fleet]:
        sys.exit(f"{options.folder} lacks {', '.join(lacking)}")


def _profiles(options: argparse.Namespace) -> None:
    from diffusion_engines.release.listing import print_profiles

    print_profiles(options.folder)


def _export_triton(options: argparse.Namespace) -> None:
    from diffusion_engines.release.triton import export_triton

    models, refused = export_triton(options.release, options.folder)
    print(f"{options.folder}: {', '.join(models)}")
    for target, reason in refused.items():
        print(f"{target} is not in it: {reason}")


def _export_oci(options: argparse.Namespace) -> None:
    from diffusion_engines.release.oci import write_layout

    print(f"{options.folder}: {write_layout(options.source, options.folder, options.tag)}")


def _import_oci(options: argparse.Namespace) -> None:
    from diffusion_engines.release.oci import read_layout

    print(f"{options.folder}: {read_layout(options.source, options.folder, options.tag)}")


def _verify(options: argparse.Namespace) -> None:
    from diffusion_engines.verify import print_report, verify_cache

    report = verify_cache(Path.cwd(), everything=options.all, remote=options.remote)
    print_report(report)
    sys.exit(bool(report.left or report.remote))


def _gc(options: argparse.Namespace) -> None:
    from diffusion_engines.garbage.asking import agrees, bytes_from_text, print_collection
    from diffusion_engines.garbage.collecting import GRACE_HOURS, Collection, collect

    budget = None if options.budget is None else bytes_from_text(options.budget)
    dropped = False

    def decide(found: Collection) -> bool:
        nonlocal dropped
        print_collection(found, budget)
        dropped = options.yes or agrees(found)
        return dropped

    grace = GRACE_HOURS if options.grace is None else options.grace
    found = collect(Path.cwd(), decide, remote=options.remote, budget=budget, grace_hours=grace)
    if not found.drop:
        print_collection(found, budget)
    else:
        print("dropped" if dropped else "nothing was dropped")


def _lease(options: argparse.Namespace) -> None:
    from diffusion_engines.garbage.collecting import renew_lease

    lease = renew_lease(Path.cwd(), remote=options.remote)
    print(f"{lease.where}: {len(lease.objects)} outputs are needed; lease {lease.clone}")


def _pull(options: argparse.Namespace) -> None:
    from diffusion_engines.remotes.commands import pull_outputs

    done = pull_outputs(Path.cwd())
    if done.damaged or done.missing:
        sys.exit("`make repro` makes again what is missing")


def _push(options: argparse.Namespace) -> None:
    from diffusion_engines.garbage.collecting import renew_lease
    from diffusion_engines.remotes.commands import push_outputs

    done = push_outputs(Path.cwd())
    renew_lease(Path.cwd(), remote=True)  # so that nobody's gc takes it for garbage
    if done.missing:
        sys.exit("`make repro` makes again what is missing; then push again")


def _diff(options: argparse.Namespace) -> None:
    from diffusion_engines.comparison.showing import compare

    worse = compare(Path.cwd(), options.before, options.after, options.folder)
    if worse and options.fail_on:
        names = (
            " ".join((one.target, one.component, one.what)).replace("  ", " ") for one in worse
        )
        sys.exit(f"worse: {', '.join(names)}")


def _quantize_auto(options: argparse.Namespace) -> None:
    from diffusion_engines.lowering.option import curve_table
    from diffusion_engines.lowering.running import quantize_auto

    path, choice = quantize_auto(
        Path.cwd(),
        options.graph,
        minutes=options.minutes,
        option=options.option or options.graph,
        base=options.base,
        depth=options.depth,
        rel_l2=options.rel_l2,
    )
    print("\n".join(curve_table(choice.found)))
    print(
        f"{len(choice.lowered)} of {len(choice.found.alone)} groups can have 8 bits: "
        f"relative L2 error {choice.built.rel_l2:.2e} (allowed {choice.allowed:.2e}), "
        f"{choice.built.bytes / 1e6:.1f} MB\n"
        f"{path.relative_to(Path.cwd())} says so; the figure is in "
        f"artifacts/quantize-auto/{options.graph}"
    )


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
