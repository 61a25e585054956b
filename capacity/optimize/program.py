"""Build the linear program as arrays: one block of rows and columns per step; all steps share the matrix, only bounds differ.

Columns of a step: n (instances held, per pool), u (instances started, per pool), x (replicas, per fitting pool-service
pair), b (idle blocks, per pool and slot size), B (idle blocks of a place, over its zones), h (surplus of a service that
counts as spare), y (capacity in the largest zone, per service over several zones). docs/capacity.md states the rows as
equations. Each row and each bounded column has the name of its constraint, for `explain.py`.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

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


class At(NamedTuple):
    """The first column of each kind in a step, and the end of all."""

    u: int
    x: int
    b: int
    s: int
    h: int
    y: int
    end: int


def columns_at(pools: int, *kinds: Sized) -> At:
    """Return where the columns begin: n and u of each pool, then x, b, B, h and y, one for each of `kinds`."""
    return At(*accumulate((pools, pools, *map(len, kinds))))


@dataclass(frozen=True)
class Program:
    """The linear program: min cost·z with row_lower <= A z <= row_upper and lower <= z <= upper.

    A is in triplets; `columns` per step, step-major.
    """

    steps: int
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
    pools: int
    price_scale: float

    @cached_property
    def at(self) -> At:
        return columns_at(self.pools, self.pairs, self.blocks, self.sums, self.spare, self.spread)

    @property
    def columns(self) -> int:
        """Columns of a step."""
        return self.at.end

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return len(self.row_names)


class _Rows:
    """Collects the rows of one step, which all steps share. `held`: the instances before the first step, per pool."""

    def __init__(self, steps: int, held: Floats) -> None:
        self.steps, self.held = steps, held
        self.names: list[Name] = []
        self.entries: list[tuple[int, Ints, Floats]] = []  # row, columns, coefficients
        self.earlier: list[tuple[int, Ints, Floats]] = []  # the same, on columns of the step before
        self.least: list[npt.ArrayLike] = []
        self.most: list[npt.ArrayLike] = []

    def add(
        self,
        name: Name,
        *terms: tuple[npt.ArrayLike, npt.ArrayLike],
        least: npt.ArrayLike = -np.inf,
        most: npt.ArrayLike = np.inf,
        before: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    ) -> None:
        """Add least <= terms <= most; a term is (columns, coefficients), `before` one on n of the step before."""
        at = len(self.names)
        self.entries += [(at, *_term(*term)) for term in terms]
        if before is not None:
            self.earlier.append((at, *_term(*before)))
        self.names.append(name)
        self.least.append(least)
        self.most.append(most)

    def bounds(self) -> tuple[Floats, Floats]:
        """Return the least and the most of all rows of all steps."""
        found = []
        for given in (self.least, self.most):
            table = np.empty((len(given), self.steps))
            for at, value in enumerate(given):
                table[at] = value
            for at, pools, coefficients in self.earlier:
                table[at, 0] -= coefficients @ self.held[pools]
            found.append(table.T.ravel())
        return found[0], found[1]

    def triplets(self, columns: int) -> tuple[Ints, Ints, Floats]:
        """Return the matrix of all steps: rows, columns, coefficients."""
        found: list[tuple[Ints, Ints, Floats]] = []
        for entries, first, shift in ((self.entries, 0, 0), (self.earlier, 1, -1)):
            count = self.steps - first
            if not entries or not count:
                continue
            step = np.arange(first, self.steps)[:, None]
            row = np.repeat([at for at, _, _ in entries], [len(cols) for _, cols, _ in entries])
            col = np.concatenate([cols for _, cols, _ in entries])
            val = np.concatenate([vals for _, _, vals in entries])
            rows, cols = row + step * len(self.names), col + (step + shift) * columns
            found.append((rows.ravel(), cols.ravel(), np.tile(val, count)))
        row, col, val = (np.concatenate(part) for part in zip(*found, strict=True))
        return row, col, val


def _term(columns: npt.ArrayLike, coefficients: npt.ArrayLike) -> tuple[Ints, Floats]:
    cols = np.array(columns, dtype=np.int64, ndmin=1)
    return cols, np.full(len(cols), coefficients, dtype=np.float64)


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
    gpus, price, held = (np.array([getattr(p, a) for p in pools], dtype=np.float64) for a in ("gpus", "price", "held"))
    everywhere = np.arange(count)
    zone = np.unique([f"{p.region}/{p.zone}" for p in pools], return_inverse=True)[1]
    place = np.array(need.place, dtype=np.int64)
    pairs = np.argwhere(need.rate > 0).astype(np.int64)
    served = need.rate[pairs[:, 0], pairs[:, 1]]
    width = np.array([slot(services[j].gpus, pools[i].gpus) for i, j in pairs.tolist()], dtype=np.float64)
    sums = sorted({(k, size) for group in need.groups for k, (size, _) in group.weights.items()})
    blocks = np.array(
        [(i, w) for i, where in enumerate(need.place) for k, w in sums if k == where], dtype=np.int64
    ).reshape(-1, 2)
    by_pool, by_service = _positions(pairs[:, 0], count), _positions(pairs[:, 1], len(services))
    zones_of = [np.unique(zone[pairs[mine, 0]]) for mine in by_service]
    spare = tuple(sorted({j for group in need.groups for j in group.relief}))
    spread = tuple(j for j in range(len(services)) if policy.zone_loss > 0 and len(zones_of[j]) > 1)
    speed = [np.unique(served[mine]) for mine in by_service]
    # Where all rates of a service are equal, replicas are counted, so that the linear program sees integers.
    unit = [float(s[0]) if len(s) == 1 else 1.0 for s in speed]
    at = columns_at(count, pairs, blocks, sums, spare, spread)
    columns = at.end
    rows = _Rows(steps, held)

    for i, (pool, mine, idle) in enumerate(zip(pools, by_pool, _positions(blocks[:, 0], count), strict=True)):
        name = Name("capacity", pool.name, f"GPUs of pool {pool.name}")
        rows.add(name, (i, gpus[i]), (at.x + mine, -width[mine]), (at.b + idle, -blocks[idle, 1]), least=0)
    for i, pool in enumerate(pools):
        name = Name("flow", pool.name, f"starts of pool {pool.name}")
        rows.add(name, (at.u + i, 1), (i, -1), least=0, before=(i, 1))
    demand_names: list[Name] = []
    for j, service in enumerate(services):
        mine = at.x + by_service[j]
        peak = f"{float(need.target[j].max()):.6g} {service.unit}/s"
        name = Name("demand", service.name, f"demand of service {service.name} (up to {peak})")
        demand_names.append(name)
        target = need.target[j] / unit[j]
        rows.add(
            name, (mine, served[by_service[j]] / unit[j]), least=round_up(target) if len(speed[j]) == 1 else target
        )
        if service.minimum > 0:
            name = Name("minimum", service.name, f"services {service.name} min {service.minimum}")
            rows.add(name, (mine, 1), least=service.minimum)
        if service.maximum is not None:
            name = Name("maximum", service.name, f"services {service.name} max {service.maximum}")
            rows.add(name, (mine, 1), most=service.maximum)
    for m, (k, w) in enumerate(sums):
        same = np.flatnonzero((place[blocks[:, 0]] == k) & (blocks[:, 1] == w))
        rows.add(
            Name("blocks", f"{k}/{w}", "idle blocks of a place"), (at.s + m, -1), (at.b + same, 1), least=0, most=0
        )
    for group in need.groups:
        fit = [(m, *group.weights[k], w) for m, (k, w) in enumerate(sums) if k in group.weights]
        covered = [at.s + m for m, size, _, w in fit if w >= size], [each * w for _, size, each, w in fit if w >= size]
        relief = [at.h + spare.index(j) for j in group.relief], list(group.relief.values())
        name = Name("idle", group.name, f"{group.name} (up to {float(group.required.max()):.6g} GPUs)")
        rows.add(name, covered, relief, least=group.required)
    for k, j in enumerate(spare):  # these rows enforce the demand, too
        rows.add(demand_names[j], (at.h + k, -1), (at.x + by_service[j], served[by_service[j]]), least=need.base[j])
    for quota in problem.quotas:
        inside = np.array([i for i in range(count) if quota.covers(pools[i])], dtype=np.int64)
        if not len(inside):
            continue
        where = f" in {quota.region}" if quota.region else ""
        name = Name("quota", quota.name, f"quota {quota.name} of {quota.gpus} {quota.gpu}{where}")
        rows.add(name, (inside, gpus[inside]), most=quota.gpus)
        # Starts precede stops: while both run, both count. More than the quota may be held before the first step.
        most = np.full(steps, float(quota.gpus))
        most[0] = max(most[0], (gpus * held)[inside].sum())
        rows.add(name, (at.u + inside, gpus[inside]), most=most, before=(inside, gpus[inside]))
    for region, share in sorted(policy.region_mix.items()):
        here = np.array([p.region == region for p in pools], dtype=np.float64)
        if share.least > 0:
            name = Name("region-min", region, f"region_mix {region} min {share.least:g}")
            rows.add(name, (everywhere, gpus * (here - share.least)), least=0)
        if share.most < 1:
            name = Name("region-max", region, f"region_mix {region} max {share.most:g}")
            rows.add(name, (everywhere, gpus * (here - share.most)), most=0)
    for k, j in enumerate(spread):
        name = Name("zones", services[j].name, f"service {services[j].name} serves on when its largest zone is lost")
        mine, rest = by_service[j], need.typical[j] * policy.zone_loss / unit[j]
        for one in zones_of[j]:
            inside = mine[zone[pairs[mine, 0]] == one]
            rows.add(name, (at.y + k, 1), (at.x + inside, -served[inside] / unit[j]), least=0)
        least = round_up(rest) if len(speed[j]) == 1 else rest
        rows.add(name, (at.y + k, -1), (at.x + mine, served[mine] / unit[j]), least=least)
    if policy.max_start is not None:
        name = Name("start-limit", "", f"policy max_start {policy.max_start}")
        rows.add(name, (at.u + everywhere, 1), most=policy.max_start)
    if policy.max_stop is not None:
        name = Name("stop-limit", "", f"policy max_stop {policy.max_stop}")
        rows.add(name, (at.u + everywhere, 1), (everywhere, -1), most=policy.max_stop, before=(everywhere, 1))

    upper = np.full((steps, columns), np.inf)
    names: dict[int, Name] = {}
    for i, pool in enumerate(pools):
        if pool.quota is not None:
            upper[:, i] = pool.quota
            names[i] = Name("pool-quota", pool.name, f"quota of pool {pool.name}, {pool.quota} instances")
        bounds = upper[:, at.u + i] = [pool.start_bound(t == 0) for t in range(steps)]
        if np.isfinite(bounds).any():
            text = f"supply of pool {pool.name}, {min(bounds):g} starts a step"
            if pool.refused is not None and bounds[0] < pool.start_bound(False):
                text += f" (the last step got {pool.refused[1]} of {pool.refused[0]} asked)"
            names[at.u + i] = Name("supply", pool.name, text)
    upper[:, at.h : at.y] = need.cap[list(spare)].T
    scale = float(price.max()) or 1.0
    cost = np.zeros(columns)
    cost[:count] = price / scale * (1 + need.loss) * (problem.step_seconds / 3600)
    cost[at.u : at.x] = price / scale * policy.switching_cost
    integer = np.ones(columns, dtype=np.bool_)
    integer[at.u : at.x] = integer[at.h :] = False  # starts are integers if instances are
    row, col, val = rows.triplets(columns)
    row_lower, row_upper = rows.bounds()
    return Program(
        steps=steps,
        row=row,
        col=col,
        val=val,
        row_lower=row_lower,
        row_upper=row_upper,
        lower=np.zeros(steps * columns),
        upper=upper.ravel(),
        cost=np.tile(cost, steps),
        integer=np.tile(integer, steps),
        row_names=tuple(rows.names),
        column_names=names,
        pairs=pairs,
        blocks=blocks,
        sums=tuple(sums),
        spare=spare,
        spread=spread,
        spread_unit=tuple(unit[j] for j in spread),
        pools=count,
        price_scale=scale,
    )


def _positions(values: Ints, count: int) -> list[Ints]:
    """Return, for each of 0 … count - 1, its positions in `values`, in order."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.cumsum(np.bincount(values, minlength=count))[:-1])


def stand_ins(pools: tuple[Pool, ...]) -> Ints:
    """Return, for each pool, the cheapest one that holds the same replicas at the same rates in the same zone."""
    found: dict[tuple[object, ...], int] = {}
    alike = [(p.gpu, p.memory, p.region, p.zone, p.gpus) for p in pools]
    for i in sorted(range(len(pools)), key=lambda i: pools[i].price):
        found.setdefault(alike[i], i)
    return np.array([found[key] for key in alike], dtype=np.int64)


def with_shared_columns(program: Program, pools: tuple[Pool, ...]) -> tuple[Program, npt.NDArray[np.bool_]]:
    """Return the program in which pools that have one stand-in share its columns of replicas and blocks, and which are kept.

    As a linear program that is exact, since the common load of these pools can be divided like their instances; it is not in
    integers, for replicas over several instances. The first rows of a step are the capacities of the pools, which are added up.
    """
    stand_in, steps = stand_ins(pools), program.steps
    own = stand_in == np.arange(len(pools))
    kept, kept_rows = np.ones(program.columns, dtype=np.bool_), np.ones(program.rows, dtype=np.bool_)
    kept[program.at.x : program.at.b] = own[program.pairs[:, 0]]
    kept[program.at.b : program.at.s] = own[program.blocks[:, 0]]
    kept_rows[: len(pools)] = own
    row_of, column_of = np.cumsum(kept_rows) - 1, np.cumsum(kept) - 1
    row_of[: len(pools)] = row_of[stand_in]
    inside = kept[program.col % program.columns]
    row, col = program.row[inside], program.col[inside]
    part = replace(
        program,
        row=row // program.rows * int(kept_rows.sum()) + row_of[row % program.rows],
        col=col // program.columns * int(kept.sum()) + column_of[col % program.columns],
        val=program.val[inside],
        row_names=tuple(name for name, stays in zip(program.row_names, kept_rows.tolist(), strict=True) if stays),
        pairs=program.pairs[own[program.pairs[:, 0]]],
        blocks=program.blocks[own[program.blocks[:, 0]]],
        **{k: getattr(program, k)[np.tile(kept_rows, steps)] for k in ("row_lower", "row_upper")},
        **{k: getattr(program, k)[np.tile(kept, steps)] for k in ("lower", "upper", "cost", "integer")},
    )
    return part, np.tile(kept, steps)


def first_step(program: Program) -> Program:
    """Return the program of the first step alone."""
    rows, columns = program.rows, program.columns
    inside = (program.row < rows) & (program.col < columns)
    return replace(
        program,
        steps=1,
        row=program.row[inside],
        col=program.col[inside],
        val=program.val[inside],
        row_lower=program.row_lower[:rows],
        row_upper=program.row_upper[:rows],
        lower=program.lower[:columns],
        upper=program.upper[:columns],
        cost=program.cost[:columns],
        integer=program.integer[:columns],
    )


def stay(program: Program, held: list[int]) -> Program:
    """Fix the first step to the instances held now."""
    lower, upper = program.lower.copy(), program.upper.copy()
    count = len(held)
    lower[:count] = held
    upper[:count] = np.minimum(upper[:count], held)  # holding more than a quota makes it infeasible
    upper[program.at.u : program.at.u + count] = 0.0
    return replace(program, lower=lower, upper=upper)
