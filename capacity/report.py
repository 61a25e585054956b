"""Render a plan or a simulation as JSON and as tables."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from capacity.actions.watch import Decision
from capacity.errors import CapacityError, InfeasibleError, InputError
from capacity.inputs.units import duration_text
from capacity.optimize.plan import Plan
from capacity.simulation.policies import Hpa
from capacity.simulation.simulate import FRONTIER, Result, pareto_of_each, settings_of

COLUMNS = 8
RUNGS = {"standby": "standby", "restored": "asleep", "cold": "cold"}
LOOSE = 0.1  # gap of a plan from which a better one is worth looking for
FEW = 6  # services, limits: more only with --explain


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
        "answer": sentence(plan, other),
        "demand": list(problem.demand.notes),
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


def when(plan: Plan, t: int) -> str:
    """Return the time of step `t` for people: `now`, `14:00`, `Tue 14:00`, or `in 3h` if the file names no time."""
    seconds = t * plan.problem.step_seconds
    if t == 0:
        return "now"
    if plan.problem.demand.begin is None:
        return f"in {duration_text(seconds)}"
    first = round(plan.problem.demand.begin / 60) * 60.0
    begin, moment, last = (
        datetime.fromtimestamp(first + s, UTC)
        for s in (0.0, seconds, (len(plan.instances) - 1) * plan.problem.step_seconds)
    )
    return moment.strftime("%H:%M" if begin.date() == last.date() else "%a %H:%M")


def _held(plan: Plan, t: int) -> dict[str, int]:
    """Return the instances held at step `t` by their type."""
    found: dict[str, int] = {}
    for pool, count in zip(plan.problem.pools, plan.instances[t].tolist(), strict=True):
        if count:
            found[pool.instance] = found.get(pool.instance, 0) + count
    return found


def _count(held: dict[str, int]) -> str:
    return " and ".join(f"{n} × {instance}" for instance, n in held.items()) or "nothing"


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def sentence(plan: Plan, other: Plan | None) -> str:
    """Return the answer in one line. `other`: the plan with cold lead times, None if they leave none."""
    now, peak = _held(plan, 0), int(plan.gpus.argmax())
    free = plan.unused(0)
    text = f"Hold {_count(now)} ({free} GPU{'' if free == 1 else 's'} idle) now"
    if plan.gpus[peak] > plan.gpus[0]:
        most = _held(plan, peak)
        text += f", {next(iter(most.values())) if most.keys() == now.keys() and len(now) == 1 else _count(most)} {_at(when(plan, peak))}"
    average = " on average" if len(plan.instances) > 1 else ""
    text += f": ${plan.hourly_cost.mean():,.2f}/h{average}."
    if other is None:
        return text + " With cold starts no plan is possible."
    more, dearer = float((other.gpus - plan.gpus).mean()), float((other.hourly_cost - plan.hourly_cost).mean())
    if abs(more) < 0.05 and abs(dearer) < 0.005:
        return text + " With cold starts you would hold as many."
    return text + (
        f" With cold starts you would hold {_number(abs(more))} GPU{'' if abs(more) == 1 else 's'} {'more' if more >= 0 else 'fewer'}"
        f"{average}: ${abs(dearer):,.2f}/h {'more' if dearer >= 0 else 'less'}."
    )


def _at(time: str) -> str:
    return time if time.startswith("in ") else f"at {time}"


def _runs(plan: Plan) -> list[tuple[int, int]]:
    """Return the steps in runs that are alike: (first, last)."""
    found: list[tuple[int, int]] = []
    for t in range(len(plan.instances)):
        same = t > 0 and all((part[t] == part[t - 1]).all() for part in (plan.instances, plan.replicas, plan.idle))
        found[-1:] = [(found[-1][0], t)] if same else [*found[-1:], (t, t)]
    return found


def _steps(plan: Plan, most: int | None) -> Table:
    """Return the table of replicas, idle GPUs and instances by service, pool and step."""
    runs = _runs(plan)
    shown = runs if most is None else runs[:most]
    heads = tuple(when(plan, a) + (f" to {when(plan, b)}" if b > a else "") for a, b in shown)
    title = "Replicas, idle GPUs and instances, by step"
    if len(shown) < len(runs):
        title += f" (the first {len(shown)} of {len(runs)} that differ; all of them: --json or --plot)"
    table = _table(title, ("service", "pool"), heads)
    pools = plan.problem.pools
    for j, service in enumerate(plan.problem.services):
        for i in np.flatnonzero(plan.replicas[:, :, j].any(axis=0)).tolist():
            table.add_row(service.name, pools[i].name, *(str(plan.replicas[a, i, j]) for a, _ in shown))
    table.add_section()
    for i in np.flatnonzero(plan.idle.any(axis=0)).tolist():
        table.add_row("idle GPUs (buffer)", pools[i].name, *(str(plan.idle[a, i]) for a, _ in shown))
    table.add_section()
    for i in np.flatnonzero(plan.instances.any(axis=0)).tolist():
        table.add_row(f"instances ({pools[i].instance})", pools[i].name, *(str(plan.instances[a, i]) for a, _ in shown))
    table.add_row("GPUs without a replica", "", *(str(plan.unused(a)) for a, _ in shown))
    table.add_row("$/h", "", *(f"{plan.hourly_cost[a]:,.2f}" for a, _ in shown))
    return table


def _sums(plan: Plan) -> list[str]:
    """Return, for each service, how its replicas of the first step come about."""
    need, level = plan.need, plan.problem.demand.quantile
    lines = []
    for j, service in enumerate(plan.problem.services):
        base, hot = float(need.base[j, 0]), float(need.hot[j, 0])
        lead, wait = duration_text(float(need.lead[j])), duration_text(service.target_wait)
        spare = f"no spare replica, for a start of {lead} is within the wait of {wait}"
        if need.lead[j] > service.target_wait:
            spare = f"{hot:.4g} for growth while a replica starts ({lead}, of which {wait} may be waited)"
        speeds = {plan.problem.pools[i].gpu: float(need.rate[i, j]) for i in np.flatnonzero(need.rate[:, j]).tolist()}
        used = {plan.problem.pools[i].gpu for i in np.flatnonzero(plan.replicas[0, :, j]).tolist()}
        serves = " or ".join(f"{rate:g} on {gpu}" for gpu, rate in speeds.items() if gpu in used or not used)
        count = int(plan.replicas[0, :, j].sum())
        planned = base / (1 + plan.problem.policy.headroom)
        zones = plan.problem.policy.zone_loss > 0 and len(_zones(plan, j)) > 1
        lines.append(
            f"{service.name}, {service.unit}/s: {need.typical[j, 0]:.4g} expected; {planned:.4g} at the {level:.0%} quantile, "
            f"{base:.4g} with headroom; {spare}. A replica serves {serves}: {count} replica{'' if count == 1 else 's'}"
            + (", also when the largest zone is lost" if zones else "")
            + _instead_of_idle(count, {speeds[gpu] for gpu in used}, base + hot, zones)
        )
    return lines


def _instead_of_idle(count: int, rates: set[float], load: float, zones: bool) -> str:
    """Return in words how many replicas are more than the load takes: they serve instead of GPUs that would stand idle."""
    least = -(-load // rates.pop()) if len(rates) == 1 and not zones else count
    if count <= least:
        return ""
    return f", {count - least:.0f} of them more than that takes: they stand by in place of idle GPUs, at the same price"


def _spares(plan: Plan) -> list[str]:
    """Return, for each set of services that share idle GPUs, how many they need in the first step."""
    lines = []
    for group in plan.need.groups:
        level = max(plan.problem.services[j].probability for j in group.services)
        size = f" for replicas of {group.size} GPUs" if group.size > 1 else ""
        lines.append(
            f"{group.name}{size}: {group.required[0]:.4g} GPUs of the fastest type, or slower ones that serve the same. They hold what "
            f"demand grows by, in {level:.0%} of cases, until a new instance has booted and started a replica; spare replicas count, too"
        )
    return lines


def _zones(plan: Plan, j: int) -> set[tuple[str, str]]:
    return {(p.region, p.zone) for i, p in enumerate(plan.problem.pools) if plan.need.rate[i, j] > 0}


def print_plan(
    console: Console, plan: Plan, other: Plan | None, *, explain: bool, columns: int | None = COLUMNS
) -> None:
    """Print the answer as a sentence, then the reasons. `columns`: most steps that the table shows; None: all."""
    console.print(sentence(plan, other), style="bold", highlight=False)
    for word in ("start", "stop"):
        actions = [f"{a['count']} × {a['instance']} in {a['pool']}" for a in delta(plan) if a["action"] == word]
        console.print(f"{word.capitalize()} now: {', '.join(actions) or 'nothing'}", highlight=False)
    console.print(_steps(plan, columns))
    console.print(
        f"GPU Allocation Utilization {plan.utilization:.1%}: of the GPU-seconds paid, those that the expected demand keeps busy"
    )
    for note in plan.problem.demand.notes:
        console.print(note, highlight=False)
    if explain or len(plan.problem.services) <= FEW:
        for line in _sums(plan) + _spares(plan):
            console.print(line, highlight=False)
    if other is not None:
        numbers = ("GPUs", "idle GPUs", "of them buffer", "$/h", "utilization")
        table = _table("What a faster start saves (mean of the steps)", ("lead times",), numbers)
        for one in (other, plan):
            table.add_row(
                one.kind, f"{one.gpus.mean():.1f}", f"{_mean_idle(one):.1f}",
                f"{one.idle.sum(axis=1).mean():.1f}", f"{one.hourly_cost.mean():.2f}", f"{one.utilization:.1%}",
            )  # fmt: skip
        console.print(table)
    for shadow in plan.shadows[: None if explain else FEW]:
        console.print(f"Bound by {shadow.constraint}: one more {shadow.unit} saves ${shadow.saves:.2f} an hour")
    if not plan.shadows:
        console.print("No quota, supply or limit binds: more of any of them saves nothing")
    console.print(_solved(plan))


def _solved(plan: Plan) -> str:
    """Describe the proven quality of the plan."""
    steps, took = len(plan.instances), duration_text(plan.seconds)
    over = f"over {steps} step{'s' if steps > 1 else ''}"
    beside = plan.cost - float(plan.hourly_cost.sum()) * plan.problem.step_seconds / 3600
    if beside > 0.005:
        over += f", ${beside:.2f} of it beside $/h: starts (switching_cost) and spot instances that are lost"
    if plan.exact_cost is None:
        return (
            f"${plan.cost:.2f} {over}; no plan costs less than ${plan.bound:.2f}: gap at most "
            f"{_gap(plan):.2%}{'; --exact looks for a better one' if _gap(plan) > LOOSE else ''}; solved in {took}"
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


def error_json(error: CapacityError) -> dict[str, Any]:
    """Return an error as plain values; an InfeasibleError with its conflict and nearest change."""
    found: dict[str, Any] = {"error": error.code, "message": error.message}
    if isinstance(error, InputError) and error.others:
        found["others"] = [{"error": other.code, "message": other.message} for other in error.others]
    if isinstance(error, InfeasibleError):
        found["conflict"] = list(error.conflict.constraints)
        found["smallest"] = error.conflict.smallest
        found["changes"] = [vars(change) for change in error.conflict.changes]
        found["changes_found"] = bool(error.conflict.changes)
    return found


def print_round(outcome: Decision | CapacityError, *, as_json: bool) -> None:
    """Print one line per round of --watch."""
    if as_json:
        said = error_json(outcome) if isinstance(outcome, CapacityError) else _round_json(outcome)
        click.echo(json.dumps(said))
    elif isinstance(outcome, CapacityError):
        click.echo(f"quickthaw: {outcome}", err=True)
    else:
        if outcome.conflict is not None:
            click.echo(f"quickthaw: {outcome.conflict}", err=True)
        click.echo("; ".join(_round_words(outcome)) or "no change")


def _round_json(outcome: Decision) -> dict[str, Any]:
    """Return what a round did. In a cluster it scales workloads, whose autoscaler starts and stops instances."""
    if outcome.moved is None:
        found = {"start": outcome.starts, "stop": outcome.stops, "held_back": outcome.blocked}
    else:
        scaled = {str(move.target): [move.before, move.after] for move in outcome.moved}
        found = {"scaled": scaled, "scale_held_back": outcome.kept}
    found["cost_per_hour"] = round(float(outcome.plan.hourly_cost[0]), 6)
    found["buffer_gpus"] = outcome.plan.buffer_by_type()
    return found | ({} if outcome.conflict is None else error_json(outcome.conflict) | {"served": outcome.served})


def _round_words(outcome: Decision) -> list[str]:
    words = [f"{name} gets {share:.0%} of its demand" for name, share in outcome.served.items() if share < 1]
    if outcome.moved is not None:
        scaled = [f"{move.target} {move.before} → {move.after}" for move in outcome.moved]
        return scaled + [f"{target} blocked by {gate}" for target, gate in outcome.kept.items()] + words
    changed = [
        f"{word} {n} {pool}"
        for word, pools in (("start", outcome.starts), ("stop", outcome.stops))
        for pool, n in pools.items()
    ]
    return changed + [f"{pool} blocked by {gate}" for pool, gate in outcome.blocked.items()] + words


def _row(result: Result) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "requests": result.requests,
        "waited": result.waited,
        "late": result.late,
        "unserved": result.unserved,
        "wait_p50_s": round(result.p50, 3),
        "wait_p99_s": round(result.p99, 3),
        "wait_max_s": round(result.longest, 3),
        "gpu_hours": round(result.gpu_hours, 3),
        "cost": round(result.cost, 2),
        "gpu_allocation_utilization": round(result.utilization, 4),
        "actions": result.actions,
        "starts": result.starts,
        "standby_gib_hours": round(result.standby_gib_hours, 3),
    }


def frontier_sentence(reached: list[Result]) -> str:
    """Return in one line what restored starts and the plan cost at the wait of the autoscaler with cold starts at its usual target."""
    usual = next(r for r in reached if r.policy == f"{FRONTIER[0]}, target {Hpa.target:.0%}")
    parts = []
    for name in FRONTIER[1:]:
        able = [r.cost for r in settings_of(reached, name) if r.p99 <= usual.p99]
        parts.append(f"{name} " + (f"for ${min(able):,.2f}" if able else "at no setting"))
    return f"{usual.policy}: p99 wait {duration_text(usual.p99)} for ${usual.cost:,.2f}. No longer waits: {', '.join(parts)}."


def simulation_json(results: list[Result], reached: list[Result]) -> dict[str, Any]:
    report: dict[str, Any] = {"policies": [_row(result) for result in results]}
    if reached:
        report["answer"] = frontier_sentence(reached)
        report["frontier"] = [_row(result) for result in reached]
    return report


def print_simulation(console: Console, results: list[Result], reached: list[Result]) -> None:
    """Print the results, and of a frontier's results `reached` what they answer and those that nothing else of their kind beats."""
    tables = [("Policies side by side", results)]
    if reached:
        console.print(frontier_sentence(reached), style="bold", highlight=False)
        best = pareto_of_each(reached)
        tables.append(("Wait against cost: the settings that no other of the same kind beats", best))
    for title, rows in tables:
        numbers = ("waited", "too long", "p50 s", "p99 s", "max s", "GPU hours", "$", "utilization", "starts from")
        table = _table(title, ("policy",), numbers)
        for r in rows:
            lost = f" ({r.unserved} unserved)" if r.unserved else ""
            rungs = ", ".join(f"{RUNGS[rung]} {count}" for rung, count in r.starts.items() if count) or "none"
            table.add_row(
                r.policy + lost, f"{r.waited}/{r.requests}", str(r.late), f"{r.p50:.2f}", f"{r.p99:.2f}", f"{r.longest:.1f}",
                f"{r.gpu_hours:.2f}", f"{r.cost:.2f}", f"{r.utilization:.1%}", rungs,
            )  # fmt: skip
        console.print(table)
    for result in results:
        if result.standby_gib_hours:
            console.print(f"{result.policy}: {result.standby_gib_hours:.1f} GiB-hours of host memory in standby")
