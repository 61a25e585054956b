"""A plan as JSON and as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from capacity.plan import Plan
from capacity.units import duration_text


def delta(plan: Plan) -> list[dict[str, Any]]:
    """What to do now, in order: every start, then every stop."""
    actions: list[dict[str, Any]] = []
    for word, counts in (("start", plan.starts[0]), ("stop", plan.stops[0])):
        for i, pool in enumerate(plan.problem.pools):
            if counts[i]:
                actions.append({"action": word, "pool": pool.name, "instance": pool.instance, "count": int(counts[i])})
    return actions


def to_json(plan: Plan, other: Plan | None = None) -> dict[str, Any]:
    """The plan as plain values. `other` is the same problem with the other lead times."""
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
                "gpus": int(one.gpus[0]),
                "idle_gpus": round(sum(one.idle_by_type().values()), 6),
                "buffer_gpus": sum(one.buffer_by_type().values()),
                "cost_per_hour": round(float(one.hourly_cost.mean()), 6),
                "gpu_allocation_utilization": round(one.utilization, 6),
            }
            for one in (other, plan)
        }
    return report


def _gap(plan: Plan) -> float:
    """Of the plan over the linear program, or of the integer program over it under --exact."""
    base = plan.relaxed_cost
    return round(plan.cost / base - 1, 6) if base > 0 else 0.0


def print_plan(console: Console, plan: Plan, other: Plan | None, *, explain: bool) -> None:
    problem = plan.problem
    table = Table(title="Now: start, then stop", title_justify="left")
    for heading in ("action", "pool", "instance", "count"):
        table.add_column(heading, justify="right" if heading == "count" else "left")
    actions = delta(plan)
    for action in actions:
        table.add_row(action["action"], action["pool"], action["instance"], str(action["count"]))
    if actions:
        console.print(table)
    else:
        console.print("Nothing to start, nothing to stop.")
    table = Table(title="Held", title_justify="left")
    for heading in ("pool", "GPU", "zone", "instances", "GPUs", "idle blocks", "$/h"):
        table.add_column(heading, justify="left" if heading in ("pool", "GPU", "zone") else "right")
    for i, pool in enumerate(problem.pools):
        n = int(plan.instances[0, i])
        if n or pool.held:
            table.add_row(
                pool.name, pool.gpu, f"{pool.region}/{pool.zone}", f"{pool.held} → {n}", str(n * pool.gpus),
                str(int(plan.idle[0, i])), f"{n * pool.price:.2f}",
            )  # fmt: skip
    console.print(table)
    if other is not None:
        table = Table(title="What a faster start is worth", title_justify="left")
        for heading in ("lead times", "GPUs", "idle GPUs", "of them blocks", "$/h", "utilization"):
            table.add_column(heading, justify="left" if heading == "lead times" else "right")
        for one in (other, plan):
            table.add_row(
                one.kind, str(int(one.gpus[0])), f"{sum(one.idle_by_type().values()):.1f}",
                str(sum(one.buffer_by_type().values())), f"{one.hourly_cost.mean():.2f}", f"{one.utilization:.1%}",
            )  # fmt: skip
        console.print(table)
    sort = "integer program" if plan.exact else "rounded linear program"
    console.print(
        f"{sort}: ${plan.cost:.2f} over {len(plan.instances)} step(s); linear program ${plan.relaxed_cost:.2f}, "
        f"gap {_gap(plan):.2%}; solved in {duration_text(plan.seconds)}"
    )
    for shadow in plan.shadows[:5]:
        console.print(f"one more {shadow.unit} {shadow.constraint} saves ${shadow.saves:.2f} an hour")
    if explain:
        _explain(console, plan)


def _explain(console: Console, plan: Plan) -> None:
    problem = plan.problem
    table = Table(title="Why: what each service needs", title_justify="left")
    for heading in ("service", "lead", "wait", "median", "to serve", "of it hot spare", "replicas"):
        table.add_column(heading, justify="left" if heading == "service" else "right")
    for j, service in enumerate(problem.services):
        table.add_row(
            service.name, duration_text(float(plan.need.lead[j])), duration_text(service.target_wait),
            f"{plan.need.median[j, 0]:.4g}", f"{plan.need.target[j, 0]:.4g}", f"{plan.need.hot[j, 0]:.4g}",
            str(int(plan.replicas[0, :, j].sum())),
        )  # fmt: skip
    console.print(table)
    for group in plan.need.groups:
        console.print(f"{group.name}: {group.required[0]:.2f} GPUs, in blocks for {group.size} GPUs a replica or more")
