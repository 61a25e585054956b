"""The commands `quickthaw plan FILE`, `quickthaw plan simulate FILE --trace CSV` and `quickthaw plan generate CSV`."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from capacity import report
from capacity.errors import CapacityError, InfeasibleError, InputError


class PlanGroup(click.Group):
    """A click group that runs `solve` if the first word is a file instead of a subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["solve", *args]
        return super().parse_args(ctx, args)


class Number(click.FloatRange):
    """A FloatRange that also rejects infinity and NaN, which passes every comparison."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails as click does."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Duration(click.ParamType[float]):
    """A duration such as `90s` or `10m`; a bare number is seconds. Returns seconds, at least `low`."""

    name = "duration"

    def __init__(self, low: float) -> None:
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds. Fails as click does."""
        from capacity.inputs.units import parse

        try:
            number = parse(value, "duration")
        except InputError as bad:
            self.fail(bad.message, param, ctx)
        if number < self.low:
            self.fail(f"{value} is shorter than {self.low:g}s.", param, ctx)
        return number


def option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Define a click option that a QUICKTHAW_PLAN_… variable also sets."""
    word = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "QUICKTHAW_PLAN_" + word.removeprefix("--").upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=True, **attributes)


def _console() -> Console:
    """Return a console; width 130 if standard output is not a terminal, so that table columns stay apart in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def fail(error: CapacityError, *, file: Path | None = None, as_json: bool = False) -> NoReturn:
    """Report an error on standard error and exit with its exit code.

    One line, or several if there is no plan. If `as_json`, also prints the error as JSON on standard output.
    """
    if isinstance(error, InfeasibleError) and error.conflict.constraints:
        first, *rest = error.lines()
        click.echo(f"quickthaw: {error.code}: {f'{file}: ' if file else ''}{first}", err=True)
        for line in rest:
            click.echo(line, err=True)
    else:
        click.echo(f"quickthaw: {error}", err=True)
    if as_json:
        click.echo(json.dumps(report.error_json(error), indent=2))
    sys.exit(error.exit_code)


@click.group(cls=PlanGroup, invoke_without_command=False, no_args_is_help=True)
def plan() -> None:
    """Plan how many GPUs to hold, where, and how many of them idle.

    \b
    quickthaw plan plan.yaml                     what to start and stop now
    quickthaw plan plan.yaml --exact --explain   the optimum, and the reasons
    quickthaw plan plan.yaml --json              for programs
    quickthaw plan plan.yaml --emit kubernetes --pause-image IMAGE   the idle buffer as objects
    quickthaw plan plan.yaml --watch 60s         plan again each minute
    quickthaw plan simulate plan.yaml --trace requests.csv --plot day
    quickthaw plan generate day.csv --requests 100000

    Fields of the file: docs/capacity.md; a first file: examples/plan.yaml. All options: quickthaw plan solve --help
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
    help="With --emit: print only these objects; default both.",
)
@option("--namespace", default="default", show_default=True, help="With --emit: namespace of the objects.")
@option(
    "--pause-image",
    help="With --emit: image of the pods that hold GPUs, such as your cluster's pause image.",
)
@option("--watch", type=Duration(0.1), metavar="INTERVAL", help="Plan again on this interval, such as 60s or 5m.")
@option(
    "--apply",
    "command",
    metavar="COMMAND",
    help="With --watch: shell command that starts and stops instances; gets the delta as JSON on standard input.",
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
    observe: str | None,
    state: Path | None,
    rounds: int,
    limit: float,
) -> None:
    """Plan FILE: what to start and stop, and what a faster start saves. The word `solve` may be omitted.

    \b
    quickthaw plan plan.yaml
    quickthaw plan plan.yaml --exact --limit 5m
    quickthaw plan plan.yaml --watch 60s --apply ./apply-delta
    """
    from capacity.inputs.load import load
    from capacity.optimize.plan import solve

    if watch is None and (command is not None or observe is not None or state is not None or rounds):
        raise click.UsageError("--apply, --observe, --state and --rounds require --watch")
    if watch is not None and (emit or thorough or explain):
        raise click.UsageError("--watch cannot be combined with --emit, --thorough or --explain")
    if emit is None and idle_by is not None:
        raise click.UsageError("--idle-by requires --emit")
    if emit is not None and not pause_image:
        raise click.UsageError("--emit needs --pause-image: an image that only waits and that your nodes can pull")
    try:
        if watch is not None:
            sys.exit(_watch(file, watch, command, observe, state, rounds, as_json, exact, limit))
        problem = load(file)
        chosen = solve(problem, "restored", exact=exact, thorough=thorough, limit=limit)
        if emit and pause_image:
            from capacity.actions.kubernetes import manifest

            click.echo(manifest(chosen, namespace=namespace, way=idle_by, pause_image=pause_image), nl=False)
            return
        other = _cold(problem, exact, thorough, limit)
    except CapacityError as error:
        fail(error, file=file, as_json=as_json)
    if as_json:
        click.echo(json.dumps(report.to_json(chosen, other), indent=2))
    else:
        report.print_plan(_console(), chosen, other, explain=explain)


def _cold(problem: Any, exact: bool, thorough: bool, limit: float) -> Any:
    """Return the same plan with cold lead times; None if they leave no feasible plan, which the report states."""
    from capacity.optimize.plan import solve

    try:
        return solve(problem, "cold", exact=exact, thorough=thorough, explained=False, limit=limit)
    except InfeasibleError:
        return None


def _watch(
    file: Path,
    interval: float,
    command: str | None,
    observe: str | None,
    state: Path | None,
    rounds: int,
    as_json: bool,
    exact: bool,
    limit: float,
) -> int:
    """Plan until a signal or for `rounds` rounds; return the exit code of the last round."""
    from capacity.actions.watch import loop
    from capacity.inputs.lead_times import home
    from capacity.inputs.load import load

    if state is None:
        state = home() / f"plan-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}.json"
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return loop(
            lambda: load(file),
            state,
            interval,
            stop,
            lambda outcome: report.print_round(outcome, as_json=as_json),
            command=command,
            observe=observe,
            rounds=rounds,
            exact=exact,
            limit=limit,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@plan.command("simulate")
@click.argument("file", type=click.Path(path_type=Path))
@option("--trace", "trace_file", type=click.Path(path_type=Path), required=True, help="CSV file of requests.")
@option(
    "--policy",
    "chosen",
    multiple=True,
    help="Simulate only this policy (name as printed); repeatable. Default all five.",
)
@option(
    "--fixed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Idle replicas per service that the fixed buffer policy holds.",
)
@option("--restored-baselines", is_flag=True, help="Also simulate the other policies with restored lead times.")
@option(
    "--equal-wait",
    is_flag=True,
    help="Also search each program's cheapest settings whose p99 wait is no longer than the autoscaler's.",
)
@option("--seed", type=int, default=1, show_default=True, help="Random seed.")
@option("--refusals", type=Number(0, 1), default=0.0, show_default=True, help="Probability that a start is refused.")
@option(
    "--interruptions",
    type=Number(min=0),
    default=1.0,
    show_default=True,
    help="Factor on the pools' interruption rates.",
)
@option("--plot", type=click.Path(path_type=Path), metavar="STEM", help="Write STEM.png and STEM.svg.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate_command(
    file: Path,
    trace_file: Path,
    chosen: tuple[str, ...],
    fixed: int,
    restored_baselines: bool,
    equal_wait: bool,
    seed: int,
    refusals: float,
    interruptions: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay a trace against policies side by side.

    \b
    quickthaw plan simulate plan.yaml --trace requests.csv
    quickthaw plan simulate plan.yaml --trace requests.csv --equal-wait --plot day --seed 7 --refusals 0.1
    """
    from capacity.inputs.load import load
    from capacity.inputs.trace import read
    from capacity.simulation import simulate

    try:
        if plot is not None and not plot.absolute().parent.is_dir():
            raise InputError("cannot-write", f"there is no folder {plot.parent}", where="--plot")
        problem, trace = load(file), read(trace_file)
        options = simulate.Options(seed=seed, refusals=refusals, interruptions=interruptions)
        policies = simulate.default_policies(fixed)
        if restored_baselines:
            policies += simulate.restored_baselines(fixed)
        known = [policy.name for policy in policies]
        strange = [name for name in chosen if name not in known]
        if strange:
            raise click.UsageError(f"no policy is named {strange[0]!r}; known: {', '.join(known)}")
        results = [
            simulate.run(problem, trace, policy, options) for policy in policies if not chosen or policy.name in chosen
        ]
        matched = simulate.equal_wait(problem, trace, options, results) if equal_wait else []
        if plot is not None:
            from capacity.simulation.plot import draw

            for path in draw(results, plot, title=f"{trace_file.name}, seed {seed}"):
                click.echo(f"wrote {path}", err=True)
    except CapacityError as error:
        fail(error)
    if as_json:
        click.echo(json.dumps(report.simulation_json(results, matched), indent=2))
    else:
        report.print_simulation(_console(), results, matched)


@plan.command("generate", short_help="Write a synthetic day of requests as CSV.")
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "--requests", type=click.IntRange(min=1), default=100_000, show_default=True, help="Expected number of requests."
)
@option(
    "--hours", type=Number(min=0, min_open=True), default=24.0, show_default=True, help="Length of the day in hours."
)
@option("--services", default="chat,code,embed", show_default=True, help="Service names, separated by commas.")
@option("--bursts", type=Number(min=0), default=6.0, show_default=True, help="Bursts per service and day.")
@option(
    "--launches",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Number of services whose demand rises permanently.",
)
@option(
    "--swing",
    type=Number(0, 0.99),
    default=0.6,
    show_default=True,
    help="Amplitude of the daily rhythm, as a share of the mean.",
)
@option("--seed", type=int, default=1, show_default=True, help="Random seed.")
def generate_command(
    file: Path, requests: int, hours: float, services: str, bursts: float, launches: int, swing: float, seed: int
) -> None:
    """Write a synthetic day of requests to FILE, as CSV that `simulate` reads.

    \b
    quickthaw plan generate day.csv --requests 100000 --seed 3
    """
    from capacity.inputs.synthetic import Day, generate, write

    try:
        names = tuple(name.strip() for name in services.split(",") if name.strip())
        trace = generate(Day(names, requests, hours, swing, bursts, launches, seed))
        write(trace, file)
    except CapacityError as error:
        fail(error)
    except OSError as error:
        fail(CapacityError("cannot-write", f"{file}: {error.strerror}"))
    click.echo(f"{len(trace.at)} requests over {trace.seconds / 3600:.1f} h to {file}")
