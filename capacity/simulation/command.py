"""The commands `quickthaw plan simulate` and `quickthaw plan generate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from capacity import report
from capacity.errors import CapacityError
from capacity.options import Number, Quantity, Samples, check_folder, console, fail, option, say


@click.command("simulate")
@click.argument("file", type=click.Path(path_type=Path), default="plan.yaml")
@option("--trace", "trace_file", type=click.Path(path_type=Path), required=True, help="CSV file of requests.")
@option(
    "--policy",
    "chosen",
    multiple=True,
    help="Simulate only this policy (name as printed); repeatable. Default all.",
)
@option(
    "--fixed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Idle replicas per service that the fixed buffer policy holds.",
)
@option(
    "--frontier",
    is_flag=True,
    help="Also show wait against cost: autoscaler cold, autoscaler restored and the plan, each at many settings.",
)
@option(
    "--cold",
    type=Samples(),
    metavar="TIMES",
    help="Cold starts of every service, such as 97s,105s; default the file's.",
)
@option("--restored", type=Samples(), metavar="TIMES", help="Restored starts of every service.")
@option("--standby-wake", type=Samples(), metavar="TIMES", help="Wakes from standby; then `lp ladder` is simulated.")
@option("--standby-memory", type=Quantity("memory"), help="Host memory of a replica in standby, such as 70GiB.")
@option("--host-memory", type=Quantity("memory"), help="Host memory of an instance for standby; default the file's.")
@option("--memory-price", type=Number(min=0), default=0.0, help="Dollars per GiB and hour of host memory in standby.")
@option("--seed", type=int, default=1, show_default=True, help="Random seed.")
@option("--refusals", type=Number(0, 1), default=0.0, show_default=True, help="Probability that a start is refused.")
@option(
    "--interruptions",
    type=Number(min=0),
    default=1.0,
    show_default=True,
    help="Factor on the pools' interruption rates.",
)
@option(
    "--plot", type=click.Path(path_type=Path), metavar="STEM", help="Write STEM.png, STEM.svg and the page STEM.html."
)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate_command(
    file: Path,
    trace_file: Path,
    chosen: tuple[str, ...],
    fixed: int,
    frontier: bool,
    cold: tuple[float, ...] | None,
    restored: tuple[float, ...] | None,
    standby_wake: tuple[float, ...] | None,
    standby_memory: float | None,
    host_memory: float | None,
    memory_price: float,
    seed: int,
    refusals: float,
    interruptions: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay a trace against policies side by side, on the pools and services of FILE (default plan.yaml).

    \b
    quickthaw plan simulate --trace requests.csv
    quickthaw plan simulate plan.yaml --trace requests.csv --frontier --plot day
    quickthaw plan simulate plan.yaml --trace requests.csv --cold 97s,105s --restored 1.9s --standby-wake 0.4s --standby-memory 70GiB
    """
    from capacity.inputs.load import load
    from capacity.inputs.trace import read
    from capacity.simulation import simulate

    if (standby_memory is not None or host_memory is not None) and standby_wake is None:
        raise click.UsageError("--standby-memory and --host-memory require --standby-wake")
    try:
        check_folder(plot)
        given = {"cold": cold, "restored": restored, "standby": standby_wake, "standby_memory": standby_memory}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        problem, trace = load(file), read(trace_file)
        problem = replace(problem, services=tuple(replace(s, **changes) for s in problem.services))
        if host_memory is not None:
            problem = replace(problem, pools=tuple(replace(p, host_memory=host_memory) for p in problem.pools))
        options = simulate.Options(seed, refusals, interruptions, memory_price)
        policies = simulate.default_policies(problem, fixed)
        known = [policy.name for policy in policies]
        strange = [name for name in chosen if name not in known]
        if strange:
            raise click.UsageError(f"no policy is named {strange[0]!r}; known: {', '.join(known)}")
        results = [
            simulate.run(problem, trace, policy, options) for policy in policies if not chosen or policy.name in chosen
        ]
        reached = simulate.frontier(problem, trace, options) if frontier else []
        if plot is not None:
            from capacity import plot as plots

            title = f"{trace_file.name}, seed {seed}"
            pictures = [plots.frontier(reached, list(simulate.FRONTIER))] if reached else []
            say(
                plots.write(
                    plot,
                    title,
                    lambda page: report.print_simulation(page, results, reached),
                    *pictures,
                    plots.over_time(results, title),
                )
            )
    except CapacityError as error:
        fail(error)
    if as_json:
        click.echo(json.dumps(report.simulation_json(results, reached), indent=2))
    else:
        report.print_simulation(console(), results, reached)


@click.command("generate", short_help="Write a synthetic day of requests as CSV.")
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
