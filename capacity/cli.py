"""The command `quickthaw plan FILE`, with the group that holds the other commands of `quickthaw plan`."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capacity import report
from capacity.errors import CapacityError, InfeasibleError
from capacity.inputs.command import init_command
from capacity.options import Duration, check_folder, console, fail, option, say
from capacity.simulation.command import generate_command, simulate_command

if TYPE_CHECKING:
    from capacity.actions.watch import Decision
    from capacity.cluster.controller import Settings
    from capacity.model import Problem
    from capacity.optimize.plan import Plan


class PlanGroup(click.Group):
    """A click group that runs `solve` if the first word is a file instead of a subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["solve", *args]
        return super().parse_args(ctx, args)


@click.group(cls=PlanGroup, invoke_without_command=False, no_args_is_help=True)
def plan() -> None:
    """Plan how many GPUs to hold, where, and how many of them idle.

    \b
    quickthaw plan init                          write a first plan.yaml
    quickthaw plan plan.yaml                     what to start and stop now
    quickthaw plan plan.yaml --exact --explain   the optimum, and the reasons
    quickthaw plan plan.yaml --json              for programs
    quickthaw plan plan.yaml --emit kubernetes --pause-image IMAGE   the idle buffer as objects
    quickthaw plan plan.yaml --watch 60s         plan again each minute
    quickthaw plan simulate plan.yaml --trace requests.csv --plot day
    quickthaw plan generate day.csv --requests 100000

    Fields of the file: docs/capacity.md; an example: examples/plan.yaml. All options: quickthaw plan solve --help
    """


@plan.command("solve", short_help="Plan FILE; the word may be omitted.")
@click.argument("file", type=click.Path(path_type=Path))
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@option(
    "--exact", is_flag=True, help="Also solve the integer program to optimality, and print the gap of the first plan."
)
@option(
    "--thorough", is_flag=True, help="Improve a large plan by search, too; by default only smaller plans are improved."
)
@option("--explain", is_flag=True, help="Show what each service needs, and why.")
@option(
    "--emit", type=click.Choice(["kubernetes"]), help="Print the idle buffer as Kubernetes objects instead of the plan."
)
@option(
    "--idle-by",
    type=click.Choice(["pause-pods", "capacity-buffer"]),
    help="With --emit: print only these objects; default both. With --apply kubernetes: which of them are scaled; default pause-pods.",
)
@option(
    "--namespace",
    default="default",
    show_default=True,
    help="With --emit: namespace of the objects. With --apply kubernetes: of the idle buffer and the Lease.",
)
@option(
    "--pause-image",
    help="With --emit: image of the pods that hold GPUs, such as your cluster's pause image.",
)
@option("--watch", type=Duration(0.1), metavar="INTERVAL", help="Plan again on this interval, such as 60s or 5m.")
@option(
    "--apply",
    "command",
    metavar="COMMAND",
    help="With --watch: shell command that starts and stops instances; gets the delta as JSON on standard input. "
    "Or kubernetes: scale the services' workloads and the idle buffer in the cluster of the pod or of KUBECONFIG.",
)
@option(
    "--demand",
    multiple=True,
    metavar="URL",
    help="With --apply kubernetes: metrics of the proxies in front, http://HOST:PORT/-/metrics, of which each address of HOST is asked.",
)
@option(
    "--demand-window",
    type=Duration(0.1),
    default="60s",
    show_default=True,
    help="With --demand: time over which its rates are averaged.",
)
@option(
    "--observe",
    metavar="COMMAND",
    help="With --watch: shell command that prints the held instances as JSON, before each plan.",
)
@option("--state", type=click.Path(path_type=Path), help="With --watch: state file; default under QUICKTHAW_HOME.")
@option(
    "--rounds", type=click.IntRange(min=0), default=0, help="With --watch: exit after this many plans; 0 means never."
)
@option("--limit", type=Duration(1.0), default="60s", show_default=True, help="Time limit of each solve.")
@option(
    "--plot", type=click.Path(path_type=Path), metavar="STEM", help="Write STEM.png, STEM.svg and the page STEM.html."
)
def solve_command(
    file: Path,
    as_json: bool,
    exact: bool,
    thorough: bool,
    explain: bool,
    emit: str | None,
    idle_by: str | None,
    namespace: str,
    pause_image: str | None,
    watch: float | None,
    command: str | None,
    demand: tuple[str, ...],
    demand_window: float,
    observe: str | None,
    state: Path | None,
    rounds: int,
    limit: float,
    plot: Path | None,
) -> None:
    """Plan FILE: what to start and stop, and what a faster start saves. The word `solve` may be omitted.

    \b
    quickthaw plan plan.yaml
    quickthaw plan plan.yaml --exact --limit 5m
    quickthaw plan plan.yaml --watch 60s --apply ./apply-delta
    quickthaw plan plan.yaml --watch 60s --apply kubernetes --namespace models --demand http://proxy:9090/-/metrics
    """
    from capacity.inputs.load import load
    from capacity.optimize.plan import solve

    if watch is None and (command is not None or observe is not None or state is not None or rounds):
        raise click.UsageError("--apply, --observe, --state and --rounds require --watch")
    if watch is not None and (emit or thorough or explain or plot):
        raise click.UsageError("--watch cannot be combined with --emit, --thorough, --explain or --plot")
    in_cluster = command == "kubernetes"
    if emit is None and not in_cluster and idle_by is not None:
        raise click.UsageError("--idle-by requires --emit or --apply kubernetes")
    if demand and not in_cluster:
        raise click.UsageError("--demand requires --apply kubernetes")
    if emit is not None and not pause_image:
        raise click.UsageError("--emit needs --pause-image: an image that only waits and that your nodes can pull")
    try:
        if watch is not None:
            cluster = None
            if in_cluster:
                from capacity.cluster.controller import Settings

                way = idle_by or "pause-pods"
                cluster = Settings(namespace, way, demand, demand_window, watch, nodes=observe is None)
            options = {"command": None if in_cluster else command, "observe": observe, "rounds": rounds}
            sys.exit(_watch(file, watch, state, cluster, as_json, exact=exact, limit=limit, **options))
        check_folder(plot)
        problem = load(file)
        chosen = solve(problem, "restored", exact=exact, thorough=thorough, limit=limit)
        if emit and pause_image:
            from capacity.actions.kubernetes import manifest

            click.echo(manifest(chosen, namespace=namespace, way=idle_by, pause_image=pause_image), nl=False)
            return
        other = _cold(problem, exact, thorough, limit)
        if plot is not None:
            say(_plot(plot, file, chosen, other))
    except CapacityError as error:
        fail(error, file=file, as_json=as_json)
    if as_json:
        click.echo(json.dumps(report.to_json(chosen, other), indent=2))
    else:
        report.print_plan(console(), chosen, other, explain=explain)


def _cold(problem: Problem, exact: bool, thorough: bool, limit: float) -> Plan | None:
    """Return the same plan with cold lead times; None if they leave no feasible plan, which the report states."""
    from capacity.optimize.plan import solve

    try:
        return solve(problem, "cold", exact=exact, thorough=thorough, explained=False, limit=limit)
    except InfeasibleError:
        return None


def _plot(stem: Path, file: Path, chosen: Plan, other: Plan | None) -> list[Path]:
    """Write the plan's picture and page; return their paths. Raises CapacityError, OSError."""
    from capacity import plot

    labels = [report.when(chosen, t) for t in range(len(chosen.instances))]
    return plot.write(
        stem,
        f"Plan of {file.name}: {report.sentence(chosen, other)}",
        lambda page: report.print_plan(page, chosen, other, explain=True, columns=None),
        plot.plan_steps(chosen, other, labels),
    )


def _watch(
    file: Path, interval: float, state: Path | None, cluster: Settings | None, as_json: bool, **options: Any
) -> int:
    """Plan until a signal or for a number of rounds; return the exit code of the last round. `options`: those of `loop`."""
    from capacity.actions.watch import loop
    from capacity.inputs.lead_times import home
    from capacity.inputs.load import load

    state = state or home() / f"plan-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}.json"
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    controller = None
    try:
        if cluster is not None:
            from capacity.cluster.controller import Controller

            controller = Controller.from_environment(file, cluster, stop)

        def tell(outcome: Decision | CapacityError) -> None:
            report.print_round(outcome, as_json=as_json)

        return loop(lambda: load(file), state, interval, stop, tell, controller=controller, **options)
    finally:
        if controller is not None:
            controller.close()
        for number, handler in before.items():
            signal.signal(number, handler)


plan.add_command(init_command)
plan.add_command(simulate_command)
plan.add_command(generate_command)
