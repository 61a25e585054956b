"""Render a plan or a simulation as JSON and as tables."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from capacity.actions.watch import Decision
from capacity.errors import CapacityError, InfeasibleError
from capacity.inputs.units import duration_text
from capacity.optimize.plan import Plan
from capacity.simulation.simulate import Result


def delta(plan: Plan) -> list[dict[str, Any]]:
    """Return the actions to take now: all starts, then all stops."""
    actions: list[dict[str, Any]] = []
    for word, counts in (("start", plan.starts[0]), ("stop", plan.stops[0])):
        for i, pool in enumerate(plan.problem.pools):
            if counts[i]:
                actions.append({"action": word, "pool": pool.name, "instance": pool.instance, "count": int(counts[i])})
    return actions


def to_json(plan: Plan, other: Plan | None = None) -> dict[str, Any]:
    """Return the plan as plain values.

    `other` is the plan of the same problem with the other lead times.
    """
    problem = plan.problem
    steps = []
    for t in range(len(plan.instances)):
        steps.append(
            {
                "instances": {p.name: int(n) for p, n in zip(problem.pools, plan.instances[t], strict=True) if n},
                "replicas": {
                    service.name: {
                        pool.name: int(plan.replicas[t, i, j])
                        for i, pool in enumerate(problem.pools)
                        if plan.replicas[t, i, j]
                    }
                    for j, service in enumerate(problem.services)
                },
                "buffer_gpus": plan.buffer_by_type(t),
                "idle_gpus": {gpu: round(value, 6) for gpu, value in plan.idle_by_type(t).items()},
                "cost_per_hour": round(float(plan.hourly_cost[t]), 6),
            }
        )
    report: dict[str, Any] = {
        "lead_times": plan.kind,
        "lead_seconds": {s.name: round(float(v), 6) for s, v in zip(problem.services, plan.need.lead, strict=True)},
        "delta": delta(plan),
        "steps": steps,
        "cost": round(plan.cost, 6),
        "cost_of_linear_program": round(plan.relaxed_cost, 6),
        "cost_of_integer_program": None if plan.exact_cost is None else round(plan.exact_cost, 6),
        "cost_of_rounding": round(plan.rounded_cost, 6),
        "proven": plan.proven,
        "lower_bound": round(plan.bound, 6),
        "gap": _gap(plan),
        "gpus": int(plan.gpus[0]),
        "gpu_allocation_utilization": round(plan.utilization, 6),
        "shadow_prices": [
            {"constraint": s.constraint, "unit": s.unit, "saves_per_hour": round(s.saves, 6)} for s in plan.shadows
        ],
        "seconds": round(plan.seconds, 4),
    }
    if other is not None:
        report["comparison"] = {
            one.kind: {
                "gpus": round(float(one.gpus.mean()), 6),
                "idle_gpus": round(_mean_idle(one), 6),
                "buffer_gpus": round(float(one.idle.sum(axis=1).mean()), 6),
                "cost_per_hour": round(float(one.hourly_cost.mean()), 6),
                "gpu_allocation_utilization": round(one.utilization, 6),
            }
            for one in (other, plan)
        }
    return report


def _mean_idle(plan: Plan) -> float:
    return sum(sum(plan.idle_by_type(t).values()) for t in range(len(plan.instances))) / len(plan.instances)


def _gap(plan: Plan) -> float:
    """Return the relative gap of the rounding.

    Over the integer program's optimum if that was proven, else over the proven lower bound, which makes it an upper bound
    of the gap.
    """
    return round(plan.rounded_cost / plan.bound - 1, 6) if plan.bound > 0 else 0.0


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """Return a table with columns of words, then of numbers."""
    table = Table(title=title, title_justify="left")
    for heading in (*left, *right):
        table.add_column(heading, justify="left" if heading in left else "right")
    return table


def print_plan(console: Console, plan: Plan, other: Plan | None, *, explain: bool) -> None:
    problem = plan.problem
    table = _table("Now: start, then stop", ("action", "pool", "instance"), ("count",))
    actions = delta(plan)
    for action in actions:
        table.add_row(action["action"], action["pool"], action["instance"], str(action["count"]))
    if actions:
        console.print(table)
    else:
        console.print("Nothing to start, nothing to stop.")
    table = _table("Held, before and after", ("pool", "GPU", "zone"), ("instances", "GPUs", "idle buffer", "$/h"))
    for i, pool in enumerate(problem.pools):
        n = int(plan.instances[0, i])
        if n or pool.held:
            table.add_row(
                pool.name, pool.gpu, f"{pool.region}/{pool.zone}", f"{pool.held} → {n}", str(n * pool.gpus),
                str(int(plan.idle[0, i])), f"{n * pool.price:.2f}",
            )  # fmt: skip
    table.add_section()
    table.add_row(
        "all", "", "", f"{sum(p.held for p in problem.pools)} → {int(plan.instances[0].sum())}", f"{plan.gpus[0]:.0f}",
        str(int(plan.idle[0].sum())), f"{float(plan.hourly_cost[0]):.2f}",
    )  # fmt: skip
    console.print(table)
    buffer = ", ".join(f"{gpus} {gpu}" for gpu, gpus in plan.buffer_by_type().items() if gpus) or "none"
    console.print(f"Idle buffer now: {buffer}. GPU Allocation Utilization over the plan: {plan.utilization:.1%}")
    if other is not None:
        numbers = ("GPUs", "idle GPUs", "of them buffer", "$/h", "utilization")
        table = _table("What a faster start saves (mean of the steps)", ("lead times",), numbers)
        for one in (other, plan):
            table.add_row(
                one.kind, f"{one.gpus.mean():.1f}", f"{_mean_idle(one):.1f}",
                f"{one.idle.sum(axis=1).mean():.1f}", f"{one.hourly_cost.mean():.2f}", f"{one.utilization:.1%}",
            )  # fmt: skip
        console.print(table)
        spare = float(other.gpus.mean() - plan.gpus.mean())
        saved = float(other.hourly_cost.mean() - plan.hourly_cost.mean())
        console.print(f"Restoring instead of starting cold saves {spare:.1f} GPUs and ${saved:.2f} an hour")
    else:
        console.print("With cold lead times there is no feasible plan.")
    console.print(_solved(plan))
    for shadow in plan.shadows[:5]:
        console.print(f"{shadow.constraint}: one more {shadow.unit} saves ${shadow.saves:.2f} an hour")
    if explain:
        _explain(console, plan)


def _solved(plan: Plan) -> str:
    """Describe the proven quality of the plan."""
    steps, took = len(plan.instances), duration_text(plan.seconds)
    over = f"over {steps} step{'s' if steps > 1 else ''}"
    if plan.exact_cost is None:
        return (
            f"${plan.cost:.2f} {over}; the linear program, which no plan undercuts, ${plan.relaxed_cost:.2f}: gap at most "
            f"{_gap(plan):.2%}; solved in {took}"
        )
    if plan.proven:
        return (
            f"integer program ${plan.exact_cost:.2f} {over}, the optimum; rounding ${plan.rounded_cost:.2f}, gap {_gap(plan):.2%}; "
            f"linear program ${plan.relaxed_cost:.2f}; solved in {took}"
        )
    more = plan.exact_cost / plan.bound - 1 if plan.bound > 0 else 0.0
    return (
        f"integer program: time ran out (--limit). Best found ${plan.exact_cost:.2f} {over}; no plan costs less than "
        f"${plan.bound:.2f}, so it is within {more:.2%} of the optimum; rounding ${plan.rounded_cost:.2f}, gap at most "
        f"{_gap(plan):.2%}; linear program ${plan.relaxed_cost:.2f}; {took}"
    )


def _explain(console: Console, plan: Plan) -> None:
    problem = plan.problem
    numbers = ("lead", "wait", "median", "to serve", "of it hot spare", "replicas")
    table = _table("Why: what each service needs", ("service",), numbers)
    for j, service in enumerate(problem.services):
        table.add_row(
            service.name, duration_text(float(plan.need.lead[j])), duration_text(service.target_wait),
            f"{plan.need.median[j, 0]:.4g}", f"{plan.need.target[j, 0]:.4g}", f"{plan.need.hot[j, 0]:.4g}",
            str(int(plan.replicas[0, :, j].sum())),
        )  # fmt: skip
    console.print(table)
    for group in plan.need.groups:
        console.print(f"{group.name}: {group.required[0]:.2f} GPUs, in blocks for {group.size} GPUs a replica or more")


def error_json(error: CapacityError) -> dict[str, Any]:
    """Return an error as plain values; an InfeasibleError with its conflict and nearest change."""
    found: dict[str, Any] = {"error": error.code, "message": error.message}
    if isinstance(error, InfeasibleError):
        found["conflict"] = list(error.conflict.constraints)
        found["smallest"] = error.conflict.smallest
        found["changes"] = [vars(change) for change in error.conflict.changes]
        found["changes_found"] = bool(error.conflict.changes)
    return found


def print_round(outcome: Decision | CapacityError, *, as_json: bool) -> None:
    """Print one line per round of --watch."""
    if isinstance(outcome, CapacityError):
        if as_json:
            click.echo(json.dumps(error_json(outcome)))
        else:
            click.echo(f"quickthaw: {outcome}", err=True)
        return
    if as_json:
        click.echo(
            json.dumps(
                {
                    "start": outcome.starts,
                    "stop": outcome.stops,
                    "held_back": outcome.blocked,
                    "cost_per_hour": round(float(outcome.plan.hourly_cost[0]), 6),
                    "buffer_gpus": outcome.plan.buffer_by_type(),
                    **({} if outcome.conflict is None else error_json(outcome.conflict) | {"served": outcome.served}),
                }
            )
        )
        return
    if outcome.conflict is not None:
        click.echo(f"quickthaw: {outcome.conflict}", err=True)
    words = [f"start {n} {pool}" for pool, n in outcome.starts.items()]
    words += [f"stop {n} {pool}" for pool, n in outcome.stops.items()]
    words += [f"{pool} blocked by {gate}" for pool, gate in outcome.blocked.items()]
    words += [f"{name} gets {share:.0%} of its demand" for name, share in outcome.served.items() if share < 1]
    click.echo("; ".join(words) or "no change")


def _row(result: Result) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "requests": result.requests,
        "waited": result.waited,
        "unserved": result.unserved,
        "wait_p50_s": round(result.p50, 3),
        "wait_p99_s": round(result.p99, 3),
        "wait_max_s": round(result.longest, 3),
        "gpu_hours": round(result.gpu_hours, 3),
        "cost": round(result.cost, 2),
        "gpu_allocation_utilization": round(result.utilization, 4),
        "actions": result.actions,
    }


def simulation_json(results: list[Result], matched: list[Result]) -> dict[str, Any]:
    report: dict[str, Any] = {"policies": [_row(result) for result in results]}
    if matched:
        report["at_equal_p99"] = [_row(result) for result in matched]
    return report


def print_simulation(console: Console, results: list[Result], matched: list[Result]) -> None:
    tables = [("Policies side by side", results)]
    if matched:
        tables.append(("At the autoscaler's p99 wait or better: the cheapest setting of each", matched))
    for title, rows in tables:
        numbers = ("waited", "p50 s", "p99 s", "max s", "GPU hours", "$", "utilization", "actions")
        table = _table(title, ("policy",), numbers)
        for r in rows:
            lost = f" ({r.unserved} unserved)" if r.unserved else ""
            table.add_row(
                r.policy + lost, f"{r.waited}/{r.requests}", f"{r.p50:.2f}", f"{r.p99:.2f}", f"{r.longest:.1f}",
                f"{r.gpu_hours:.2f}", f"{r.cost:.2f}", f"{r.utilization:.1%}", str(r.actions),
            )  # fmt: skip
        console.print(table)
