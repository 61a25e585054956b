"""Build the linear program as arrays: one block of rows and columns per step; all steps share the matrix, only bounds differ.

Columns of a step: n (instances held, per pool), u (instances started, per pool), x (replicas, per fitting pool-service
pair), b (idle blocks, per pool and slot size), B (idle blocks of a place, over its zones), h (surplus of a service that
counts as spare), y (capacity in the largest zone, per service over several zones). docs/capacity.md states the rows as
equations. Each row and each bounded column has the name of its constraint, for `explain.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from capacity.model import Floats, Pool, Problem, slot
from capacity.requirements import Need

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Name:
    """Name of a constraint: its sort, the key of the object in the file, and its text."""

    sort: str
    key: str
    text: str


@dataclass(frozen=True)
class Program:
    """The linear program: min cost·z with row_lower <= A z <= row_upper and lower <= z <= upper.

    A is in triplets; `columns` per step, step-major.
    """

    steps: int
    columns: int
    rows: int
    row: Ints
    col: Ints
    val: Floats
    row_lower: Floats
    row_upper: Floats
    lower: Floats
    upper: Floats
    cost: Floats
    integer: npt.NDArray[np.bool_]
    row_names: tuple[Name, ...]  # one per row of a step
    column_names: dict[int, Name]  # column of a step -> name of its upper bound
    pairs: Ints  # [x column, 2]: pool, service
    blocks: Ints  # [b column, 2]: pool, slot size
    sums: tuple[tuple[int, int], ...]  # [B column]: place, slot size
    spare: tuple[int, ...]  # services with an h column
    spread: tuple[int, ...]  # services with a y column
    spread_unit: tuple[float, ...]  # unit of y: replicas of this rate, or 1.0 per second
    at_u: int
    at_x: int
    at_b: int
    at_s: int
    at_h: int
    at_y: int
    price_scale: float
    pair_price: Floats  # [x column] dollars per unit of demand served; orders the places to try
    stand_in: Ints  # [pool] the cheapest pool that differs only in price, quota, supply and boot time


class _Rows:
    """Collects the rows of one step."""

    def __init__(self) -> None:
        self.row: list[Ints] = []
        self.col: list[Ints] = []
        self.val: list[Floats] = []
        self.names: list[Name] = []
        self.lower: list[Floats] = []
        self.upper: list[Floats] = []
        self.previous: list[tuple[int, int, float]] = []  # row, column of the step before, coefficient

    def add(self, name: Name, cols: Ints, vals: Floats, lower: Floats, upper: Floats) -> int:
        index = len(self.names)
        self.row.append(np.full(len(cols), index, dtype=np.int64))
        self.col.append(np.asarray(cols, dtype=np.int64))
        self.val.append(np.asarray(vals, dtype=np.float64))
        self.names.append(name)
        self.lower.append(lower)
        self.upper.append(upper)
        return index


def round_up(values: Floats) -> Floats:
    """Return the next integers, tolerating rounding errors of a division."""
    result: Floats = np.ceil(values - 1e-9)
    return result


def build(problem: Problem, need: Need) -> Program:
    """Build the program of a problem.

    Prices are divided by the largest, so that solver tolerances do not depend on the currency.
    """
    pools, services, policy, steps = problem.pools, problem.services, problem.policy, problem.demand.steps
    count = len(pools)
    gpus = np.array([p.gpus for p in pools], dtype=np.float64)
    held = np.array([p.held for p in pools], dtype=np.float64)
    pairs = np.argwhere(need.rate > 0).astype(np.int64)
    sizes, size_of = np.unique([p.gpus for p in pools], return_inverse=True)
    wants, want_of = np.unique([s.gpus for s in services], return_inverse=True)
    slots = np.array([[slot(int(w), int(g)) for w in wants] for g in sizes], dtype=np.float64)
    width = slots[size_of[pairs[:, 0]], want_of[pairs[:, 1]]]
    sums = sorted({(k, w) for g in need.groups for k, (w, _) in g.weights.items()})
    sizes_of: dict[int, list[int]] = {}
    for k, w in sums:
        sizes_of.setdefault(k, []).append(w)
    blocks = np.array([(i, w) for i in range(count) for w in sizes_of.get(need.place[i], ())], dtype=np.int64).reshape(
        -1, 2
    )
    zone = np.unique([f"{p.region}/{p.zone}" for p in pools], return_inverse=True)[1]
    zones_of = [np.unique(zone[need.rate[:, j] > 0]) for j in range(len(services))]
    spread = tuple(j for j in range(len(services)) if policy.zone_loss > 0 and len(zones_of[j]) > 1)
    at_u, at_x = count, 2 * count
    at_b = at_x + len(pairs)
    at_s = at_b + len(blocks)
    spare = tuple(sorted({j for g in need.groups for j in g.relief}))
    at_h = at_s + len(sums)
    at_y = at_h + len(spare)
    columns = at_y + len(spread)
    none, free = np.full(steps, -np.inf), np.full(steps, np.inf)
    zero = np.zeros(steps)
    rows = _Rows()

    by_pool = _positions(pairs[:, 0], count)
    by_service = _positions(pairs[:, 1], len(services))
    blocks_by_pool = _positions(blocks[:, 0], count)
    served = need.rate[pairs[:, 0], pairs[:, 1]]
    for i, pool in enumerate(pools):
        mine = blocks_by_pool[i]
        cols = np.concatenate([[i], at_x + by_pool[i], at_b + mine])
        vals = np.concatenate([[gpus[i]], -width[by_pool[i]], -blocks[mine, 1].astype(np.float64)])
        rows.add(Name("capacity", pool.name, f"GPUs of pool {pool.name}"), cols, vals, zero, free)
    for i, pool in enumerate(pools):
        lower = zero.copy()
        lower[0] = -held[i]
        index = rows.add(
            Name("flow", pool.name, f"starts of pool {pool.name}"),
            np.array([at_u + i, i]),
            np.array([1.0, -1.0]),
            lower,
            free,
        )
        rows.previous.append((index, i, 1.0))
    for j, service in enumerate(services):
        cols = at_x + by_service[j]
        peak = float(need.target[j].max())
        name = Name("demand", service.name, f"demand of service {service.name} (up to {peak:.6g} {service.unit}/s)")
        speeds = np.unique(served[by_service[j]])
        if len(speeds) == 1:
            # All rates are equal: count replicas, so that the linear program sees integers.
            rows.add(name, cols, np.ones(len(cols)), round_up(need.target[j] / speeds[0]), free)
        else:
            rows.add(name, cols, served[by_service[j]], need.target[j], free)
        if service.minimum > 0:
            name = Name("minimum", service.name, f"services {service.name} min {service.minimum}")
            rows.add(name, cols, np.ones(len(cols)), np.full(steps, float(service.minimum)), free)
        if service.maximum is not None:
            name = Name("maximum", service.name, f"services {service.name} max {service.maximum}")
            rows.add(name, cols, np.ones(len(cols)), none, np.full(steps, float(service.maximum)))
    block_place = np.array(need.place, dtype=np.int64)[blocks[:, 0]]
    for m, (place, block) in enumerate(sums):
        alike = np.flatnonzero((block_place == place) & (blocks[:, 1] == block))
        name = Name("blocks", f"{place}/{block}", "idle blocks of a place")
        cols = np.concatenate([[at_s + m], at_b + alike])
        rows.add(name, cols, np.concatenate([[-1.0], np.ones(len(alike))]), zero, zero)
    for group in need.groups:
        cols_list, vals_list = [], []
        for m, (place, block) in enumerate(sums):
            weight = group.weights.get(place)
            if weight is not None and block >= weight[0]:
                cols_list.append(at_s + m)
                vals_list.append(weight[1] * block)
        peak = float(group.required.max())
        name = Name("idle", group.name, f"{group.name} (up to {peak:.6g} GPUs)")
        relieved = [j for j in spare if j in group.relief]
        cols_list += [at_h + spare.index(j) for j in relieved]
        vals_list += [group.relief[j] for j in relieved]
        rows.add(name, np.array(cols_list, dtype=np.int64), np.array(vals_list), group.required, free)
    demand_of = {name.key: name for name in rows.names if name.sort == "demand"}
    for k, j in enumerate(spare):
        mine = at_x + by_service[j]
        name = demand_of[services[j].name]  # this row enforces the demand, too
        cols, vals = np.concatenate([[at_h + k], mine]), np.concatenate([[-1.0], served[by_service[j]]])
        rows.add(name, cols, vals, need.base[j], free)
    for quota in problem.quotas:
        inside = np.array([i for i in range(count) if quota.covers(pools[i])], dtype=np.int64)
        if not len(inside):
            continue
        where = f" in {quota.region}" if quota.region else ""
        name = Name("quota", quota.name, f"quota {quota.name} of {quota.gpus} {quota.gpu}{where}")
        rows.add(name, inside, gpus[inside], none, np.full(steps, float(quota.gpus)))
        # Starts precede stops: while both run, both count.
        upper = np.full(steps, float(quota.gpus))
        upper[0] = max(0.0, quota.gpus - float((gpus * held)[inside].sum()))
        index = rows.add(name, at_u + inside, gpus[inside], none, upper)
        rows.previous.extend((index, int(i), float(gpus[i])) for i in inside)
    everywhere = np.arange(count)
    for region, share in sorted(policy.region_mix.items()):
        here = np.array([p.region == region for p in pools], dtype=np.float64)
        if share.least > 0:
            name = Name("region-min", region, f"region_mix {region} min {share.least:g}")
            rows.add(name, everywhere, gpus * (here - share.least), zero, free)
        if share.most < 1:
            name = Name("region-max", region, f"region_mix {region} max {share.most:g}")
            rows.add(name, everywhere, gpus * (here - share.most), none, zero)
    spread_unit: list[float] = []
    for k, j in enumerate(spread):
        name = Name("zones", services[j].name, f"service {services[j].name} serves on when its largest zone is lost")
        mine = by_service[j]
        speeds = np.unique(served[mine])
        unit = float(speeds[0]) if len(speeds) == 1 else 1.0
        spread_unit.append(unit)
        rest = need.median[j] * policy.zone_loss / unit
        for one in zones_of[j]:
            inside = mine[zone[pairs[mine, 0]] == one]
            cols = np.concatenate([[at_y + k], at_x + inside])
            rows.add(name, cols, np.concatenate([[1.0], -served[inside] / unit]), zero, free)
        cols = np.concatenate([[at_y + k], at_x + mine])
        vals = np.concatenate([[-1.0], served[mine] / unit])
        rows.add(name, cols, vals, round_up(rest) if len(speeds) == 1 else rest, free)
    if policy.max_start is not None:
        name = Name("start-limit", "", f"policy max_start {policy.max_start}")
        rows.add(name, at_u + everywhere, np.ones(count), none, np.full(steps, float(policy.max_start)))
    if policy.max_stop is not None:
        name = Name("stop-limit", "", f"policy max_stop {policy.max_stop}")
        upper = np.full(steps, float(policy.max_stop))
        upper[0] -= held.sum()
        cols = np.concatenate([at_u + everywhere, everywhere])
        index = rows.add(name, cols, np.concatenate([np.ones(count), -np.ones(count)]), none, upper)
        rows.previous.extend((index, i, 1.0) for i in range(count))
    price = np.array([p.price / p.gpus for p in pools])
    pair_price = price[pairs[:, 0]] * width / served
    units = tuple(float(u) for u in spread_unit)
    cheapest: dict[tuple[str, float, str, str, int], int] = {}
    for i in np.argsort([p.price for p in pools], kind="stable").tolist():
        cheapest.setdefault(_sort_of(pools[i]), i)
    stand_in = np.array([cheapest[_sort_of(p)] for p in pools], dtype=np.int64)
    at = (at_u, at_x, at_b, at_s, at_h, at_y)
    return _tile(
        problem, need.loss, rows, columns, pairs, blocks, tuple(sums), (spread, units), at, spare, need.cap, pair_price,
        stand_in,
    )  # fmt: skip


def _positions(values: Ints, count: int) -> list[Ints]:
    """Return, for each of 0 … count - 1, its positions in `values`, in order."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.cumsum(np.bincount(values, minlength=count))[:-1])


def _sort_of(pool: Pool) -> tuple[str, float, str, str, int]:
    """Return a key of pools that hold the same replicas at the same rate and are in the same zone."""
    return pool.gpu, pool.memory, pool.region, pool.zone, pool.gpus


def _tile(
    problem: Problem,
    loss: Floats,
    rows: _Rows,
    columns: int,
    pairs: Ints,
    blocks: Ints,
    sums: tuple[tuple[int, int], ...],
    spread: tuple[tuple[int, ...], tuple[float, ...]],
    at: tuple[int, int, int, int, int, int],
    spare: tuple[int, ...],
    cap: Floats,
    pair_price: Floats,
    stand_in: Ints,
) -> Program:
    pools, steps = problem.pools, problem.demand.steps
    at_u, at_x, at_b, at_s, at_h, at_y = at
    count, high = len(pools), len(rows.names)
    row, col, val = np.concatenate(rows.row), np.concatenate(rows.col), np.concatenate(rows.val)
    step = np.arange(steps)[:, None]
    all_rows = [(row[None, :] + step * high).ravel()]
    all_cols = [(col[None, :] + step * columns).ravel()]
    all_vals = [np.tile(val, steps)]
    if steps > 1 and rows.previous:
        late = np.arange(1, steps)[:, None]
        prow = np.array([r for r, _, _ in rows.previous], dtype=np.int64)
        pcol = np.array([c for _, c, _ in rows.previous], dtype=np.int64)
        pval = np.array([v for _, _, v in rows.previous])
        all_rows.append((prow[None, :] + late * high).ravel())
        all_cols.append((pcol[None, :] + (late - 1) * columns).ravel())
        all_vals.append(np.tile(pval, steps - 1))
    upper = np.full((steps, columns), np.inf)
    names: dict[int, Name] = {}
    for i, pool in enumerate(pools):
        if pool.quota is not None:
            upper[:, i] = pool.quota
            names[i] = Name("pool-quota", pool.name, f"quota of pool {pool.name}, {pool.quota} instances")
        bounds = np.array([pool.start_bound(t == 0) for t in range(steps)])
        upper[:, at_u + i] = bounds
        if np.isfinite(bounds).any():
            text = f"supply of pool {pool.name}, {bounds.min():g} starts a step"
            if pool.refused is not None and bounds[0] < pool.start_bound(False):
                text += f" (the last step got {pool.refused[1]} of {pool.refused[0]} asked)"
            names[at_u + i] = Name("supply", pool.name, text)
    for k, j in enumerate(spare):
        upper[:, at_h + k] = cap[j]
    price = np.array([p.price for p in pools])
    scale = float(price.max()) or 1.0
    cost = np.zeros((steps, columns))
    cost[:, :count] = price / scale * (1 + loss) * (problem.step_seconds / 3600)
    cost[:, at_u : at_u + count] = price / scale * problem.policy.switching_cost
    integer = np.ones((steps, columns), dtype=np.bool_)
    integer[:, count : 2 * count] = False  # starts are integers if instances are
    integer[:, at_h:] = False
    return Program(
        steps=steps,
        columns=columns,
        rows=high,
        row=np.concatenate(all_rows),
        col=np.concatenate(all_cols),
        val=np.concatenate(all_vals),
        row_lower=np.array(rows.lower).T.ravel(),
        row_upper=np.array(rows.upper).T.ravel(),
        lower=np.zeros(steps * columns),
        upper=upper.ravel(),
        cost=cost.ravel(),
        integer=integer.ravel(),
        row_names=tuple(rows.names),
        column_names=names,
        pairs=pairs,
        blocks=blocks,
        sums=sums,
        spare=spare,
        spread=spread[0],
        spread_unit=spread[1],
        at_u=at_u,
        at_x=at_x,
        at_b=at_b,
        at_s=at_s,
        at_h=at_h,
        at_y=at_y,
        price_scale=scale,
        pair_price=pair_price,
        stand_in=stand_in,
    )


def stay(program: Program, held: list[int]) -> Program:
    """Fix the first step to the instances held now."""
    lower, upper = program.lower.copy(), program.upper.copy()
    count = len(held)
    lower[:count] = held
    upper[:count] = np.minimum(upper[:count], held)  # holding more than a quota makes it infeasible
    upper[program.at_u : program.at_u + count] = 0.0
    return replace(program, lower=lower, upper=upper)
