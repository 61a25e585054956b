"""Measure the capacity planner's promises, and print each beside its target.

    python benchmarks/capacity.py                 everything; two to four minutes on two cores
    python benchmarks/capacity.py --only solve    one section: solve, gap, scipy, million, trace
    python benchmarks/capacity.py --only bound    how far a large plan can be from the optimum (--seconds for the integer program)
    python benchmarks/capacity.py --json

`trace` needs the Azure code trace (../shared/data/azure_llm_2023_code.csv); without it the section is skipped with a message.
`--trace` names others, as often as wanted: such as the hour of conversations, data/AzureLLMInferenceTrace_conv.csv of
github.com/Azure/AzurePublicDataset.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from capacity import report  # noqa: E402
from capacity.errors import InfeasibleError  # noqa: E402
from capacity.inputs import synthetic, trace  # noqa: E402
from capacity.inputs.load import load  # noqa: E402
from capacity.model import Demand, Forecast, Policy, Pool, Problem, Service  # noqa: E402
from capacity.optimize import plan  # noqa: E402
from capacity.simulation import simulate  # noqa: E402
from capacity.simulation.policies import Program  # noqa: E402
from tests.kits.capacity_kit import naive, random_problem  # noqa: E402

TYPES = (("H100", 8, 80.0, 24.0), ("A100", 8, 80.0, 14.0), ("L40S", 4, 48.0, 6.0), ("H200", 8, 141.0, 33.0))


def large(pools, services, steps, seed=1, *, everywhere=False):
    """Four GPU types, five regions of three zones; services of 1 to 8 GPUs allowed in three regions each, with a rate on every
    type; zone loss on; a daily rhythm with p50 and p90."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(pools):
        gpu, gpus, memory, price = TYPES[i % 4]
        made.append(
            Pool(
                f"p{i}", f"{gpus}x{gpu}", gpu, gpus, memory, f"r{i // 4 % 5}", f"z{i // 20 % 3}",
                round(price * float(random.uniform(0.9, 1.2)), 2), quota=int(random.integers(20, 60)),
                held=int(random.integers(0, 5)), boot=tuple(random.uniform(60, 240, 5)),
                interruptions=float(random.uniform(0, 0.02)),
            )
        )  # fmt: skip
    listed, forecasts = [], {}
    for j in range(services):
        gpus = int(random.choice([1, 1, 1, 2, 4, 8]))
        regions = tuple(f"r{k}" for k in sorted(random.choice(5, 3, replace=False)))
        regions = None if everywhere else regions
        listed.append(
            Service(
                f"s{j}", gpus, {"H100": 10.0, "A100": 5.0, "L40S": 2.5, "H200": 13.0},
                cold=tuple(random.uniform(60, 130, 5)), restored=tuple(random.uniform(0.6, 2, 5)),
                memory=float(random.choice([20, 40, 60])), target_wait=5.0, regions=regions,
            )
        )  # fmt: skip
        base = random.uniform(5, 200) / max(1, gpus / 2)
        median = base * (1 + 0.5 * np.sin(np.arange(steps) / steps * 2 * np.pi + random.uniform(0, 6)))
        forecasts[f"s{j}"] = Forecast((0.5, 0.9), (tuple(median.tolist()), tuple((median * 1.25).tolist())))
    return Problem(tuple(made), tuple(listed), Demand(0.9, forecasts), Policy())


def middling(seed):
    """Eight pools in two regions, ten services."""
    return large(8, 10, 1, seed, everywhere=True)


def timed(work, runs):
    """Medians of wall and CPU seconds."""
    wall, cpu = [], []
    for _ in range(runs):
        a, b = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - b)
    return round(statistics.median(wall), 3), round(statistics.median(cpu), 3)


def solve_section(runs):
    """From the problem to whole instances: requirement, program, linear program, rounding, check."""
    rows = []
    for pools, services, steps, target in ((40, 60, 24, 2.0), (400, 200, 1, 1.0)):
        problem = large(pools, services, steps)
        found = plan.solve(problem)
        wall, cpu = timed(lambda problem=problem: plan.solve(problem), runs)
        wall_lp, cpu_lp = timed(lambda problem=problem: linear(problem), runs)
        rows.append(
            {
                "what": f"{pools} pools x {services} services x {steps} steps",
                "linear_program_wall_s": wall_lp,
                "linear_program_cpu_s": cpu_lp,
                "integer_plan_wall_s": wall,
                "integer_plan_cpu_s": cpu,
                "target_s": target,
                "over_linear_program": round(found.rounded_cost / found.relaxed_cost - 1, 4),
            }
        )
    return rows


def linear(problem):
    """The linear program from the problem on: requirement, arrays, solve."""
    from capacity import requirements
    from capacity.optimize import program, solver

    built = program.build(problem, requirements.compute(problem, "restored"))
    return solver.relax(program.with_shared_columns(built, problem.pools)[0])


def gap_section(count):
    """Rounding against the proven optimum of the integer program. Small plans and middling ones (8 pools, 10 services,
    drawn as the large ones are) are improved by search; construction alone is what the largest plans get."""
    names = ("small: search", "small: construction alone", "middling: search", "middling: construction alone")
    found = {name: [] for name in names}
    for size, wanted in (("small", count), ("middling", max(1, count // 5))):
        seed = 0
        while len(found[names[0 if size == "small" else 2]]) < wanted:
            seed += 1
            if size == "small":
                problem = random_problem(50_000 + seed, pools=4, services=3, steps=1 + seed % 2)
            else:
                problem = middling(seed)
            try:
                default = plan.solve(problem, exact=True, explained=False, limit=20.0)
                built = plan.solve(problem, quick=True, explained=False)
            except InfeasibleError:
                continue
            if default.proven:
                first, second = names[:2] if size == "small" else names[2:]
                found[first].append(default.rounded_cost / default.exact_cost - 1)
                found[second].append(built.rounded_cost / default.exact_cost - 1)
    return [
        {
            "rounding": name,
            "instances": len(gaps),
            "mean": round(statistics.fmean(gaps), 5),
            "worst": round(max(gaps), 5),
            "within_2_percent": round(sum(g <= 0.02 for g in gaps) / len(gaps), 4),
            "target": None if "alone" in name else 0.02,
        }
        for name, gaps in found.items()
    ]


def bound_section(seconds):
    """40 pools x 60 services x 1 step, for which no optimum is known: the rounding against what the integer program proves that no
    plan undercuts, and against the best plan it finds in the time given."""
    problem, rows = large(40, 60, 1), []
    for name, options in (("construction alone", {"quick": True}), ("default", {})):
        wall = time.perf_counter()
        found = plan.solve(problem, **options)
        rows.append({"rounding": name, "wall_s": round(time.perf_counter() - wall, 2), "cost": found.rounded_cost})
    best = plan.solve(problem, exact=True, limit=seconds)
    for row in rows:
        cost = row.pop("cost")
        row["over_linear_program"] = round(cost / best.relaxed_cost - 1, 4)
        row["over_proven_bound"] = round(cost / best.bound - 1, 4)
        row["over_best_known"] = round(cost / best.exact_cost - 1, 4)
        row["bound_over_linear_program"] = round(best.bound / best.relaxed_cost - 1, 4)
    return rows


def scipy_section(count):
    """The same integer programs, written down twice, solved by both."""
    same = infeasible = differ = seed = 0
    worst = 0.0
    while same + differ < count:
        seed += 1
        problem = random_problem(10_000 + seed)
        expected = naive(problem)
        try:
            cost = plan.solve(problem, exact=True, explained=False).exact_cost
        except InfeasibleError:
            cost = None
        if cost is None or expected is None:
            infeasible += 1
            differ += cost is not expected
            continue
        off = abs(cost - expected) / expected
        worst = max(worst, off)
        same += off <= 1e-6
        differ += off > 1e-6
    return [
        {
            "instances": count,
            "same_optimum": same,
            "different": differ,
            "both_infeasible_besides": infeasible,
            "worst_difference": worst,
        }
    ]


SERVICES = """
pools:
  - {{name: h100-a, gpu: H100, gpus: 8, memory: 80, region: east, zone: a, price: 24, quota: 40,
     boot: [95s, 110s, 130s], interruptions: 0.01/h}}
  - {{name: h100-b, gpu: H100, gpus: 8, memory: 80, region: east, zone: b, price: 24, quota: 40,
     boot: [95s, 110s, 130s], interruptions: 0.01/h}}
services:
  - {{name: chat, gpus: 4, rate: 2, target_wait: 10s, probability: 0.95, lead_time: {{cold: [97s, 127s], restored: [1.2s, 1.9s]}}}}
  - {{name: code, gpus: 1, rate: 3, target_wait: 5s, probability: 0.95, lead_time: {{cold: [67s, 97s], restored: [0.7s, 1.1s]}}}}
  - {{name: embed, gpus: 1, rate: 8, target_wait: 5s, probability: 0.95, lead_time: {{cold: [40s, 52s], restored: [0.7s, 0.8s]}}}}
demand: {{forecast: {{chat: {q}, code: {q}, embed: {q}}}}}
policy: {{zone_loss: 0, hysteresis: {{hold_down: 5m}}}}
"""


def million_section(requests):
    """A synthetic day of three services, every policy in turn."""
    from capacity.inputs import document
    from capacity.inputs.load import from_field

    text = SERVICES.format(q="{0.5: [1], 0.9: [2]}")
    problem = from_field(document.parse_text(text, "benchmark"), Path("benchmark"))
    day = synthetic.generate(synthetic.Day(requests=requests, seed=1))
    rows = []
    for policy in simulate.default_policies(problem):
        wall, cpu = time.perf_counter(), time.process_time()
        result = simulate.run(problem, day, policy, simulate.Options())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        row = report.simulation_json([result], [])["policies"][0]
        rows.append({**row, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "target_s": 30.0})
    return rows


def trace_section(path):
    """The real hour: as in the file, each program's cheapest setting at the autoscaler's p99, and wait against cost."""
    problem, requests = load(REPO / "examples" / "plan_trace.yaml"), trace.read(path)
    options = simulate.Options()
    results = [simulate.run(problem, requests, policy, options) for policy in simulate.default_policies(problem)]
    equal = [next(r for r in results if r.policy == "hpa")]
    for kind in ("cold", "restored"):
        swept = simulate.sweep(problem, requests, options, Program(name=f"lp {kind}", kind=kind), equal[0].p99)
        equal += sorted((r for r in swept if r.p99 <= equal[0].p99), key=lambda r: r.gpu_hours)[:1]
    reached = simulate.pareto_of_each(simulate.frontier(problem, requests, options))
    tables = {"as_in_the_file": results, "at_equal_p99": equal, "frontier": reached}
    return {name: report.simulation_json(rows, [])["policies"] for name, rows in tables.items()}


def marks(found):
    """Return one line per target: the target, the measured value, and whether it is met."""
    rows = []

    def add(what, mark, measured, met):
        rows.append({"what": what, "mark": mark, "measured": measured, "met": "yes" if met else "NO"})

    for row in found.get("solve", ()):
        for part, key in (("linear program", "linear_program_wall_s"), ("checked plan", "integer_plan_wall_s")):
            add(f"{row['what']}, {part}", f"< {row['target_s']:g} s", f"{row[key]:g} s", row[key] < row["target_s"])
    for row in found.get("gap", ()):
        if row["target"] is not None:
            measured = f"mean {row['mean']:.2%}, worst {row['worst']:.2%} of {row['instances']}"
            add(f"rounding over the optimum, {row['rounding']}", "< 2 %", measured, row["worst"] < row["target"])
    for row in found.get("scipy", ()):
        measured = f"{row['same_optimum']} of {row['instances']}"
        add("same optimum as scipy.optimize.milp", "every one", measured, row["same_optimum"] == row["instances"])
    for row in found.get("million", ()):
        what = f"{row['requests']} requests, {row['policy']}"
        add(what, f"< {row['target_s']:g} s", f"{row['wall_s']:g} s", row["wall_s"] < row["target_s"])
    for title, rows_of in found.items():
        if not title.endswith("_at_equal_p99"):
            continue
        equal = {row["policy"].split(",")[0]: row for row in rows_of}
        restored, bar = equal.get("lp restored"), equal["hpa"]
        for other in ("hpa", "lp cold"):
            what = f"{title.removesuffix('_at_equal_p99')}: GPU hours of lp restored and of {other}, p99 at most {bar['wait_p99_s']:.1f} s"
            if restored is None:
                add(what, "fewer", "no setting of lp restored waits as little", False)
            elif other not in equal:
                add(what, "fewer", f"{restored['gpu_hours']:.1f}; no setting of {other} waits as little", True)
            else:
                hours = restored["gpu_hours"], equal[other]["gpu_hours"]
                add(what, "fewer", f"{hours[0]:.1f} and {hours[1]:.1f}", hours[0] < hours[1])
    return rows


def show(title, rows):
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=170).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("solve", "gap", "bound", "scipy", "million", "trace"), action="append")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the integer program of bound")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--instances", type=int, default=300)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--trace", type=Path, action="append", help="CSV of requests, as often as wanted")
    options = parser.parse_args()
    wanted = options.only or ["solve", "gap", "scipy", "million", "trace"]
    found = {}
    if "solve" in wanted:
        found["solve"] = solve_section(options.runs)
    if "gap" in wanted:
        found["gap"] = gap_section(min(100, options.instances))
    if "bound" in wanted:
        found["bound"] = bound_section(options.seconds)
    if "scipy" in wanted:
        found["scipy"] = scipy_section(options.instances)
    if "million" in wanted:
        found["million"] = million_section(options.requests)
    if "trace" in wanted:
        for path in options.trace or [REPO.parent / "shared" / "data" / "azure_llm_2023_code.csv"]:
            if path.exists():
                found.update({f"{path.stem}_{key}": rows for key, rows in trace_section(path).items()})
            else:
                print(f"no trace at {path}: that section is left out", file=sys.stderr)
    if reached := marks(found):
        found["marks"] = reached
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        show(title.replace("_", " "), rows)


if __name__ == "__main__":
    main()
