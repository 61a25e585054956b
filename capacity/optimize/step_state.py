"""The state of one step under construction: instances, replicas and idle blocks placed so far, and the room left for more.

`construct.py` makes the moves; this module keeps the sums that they change, such as free GPUs, quotas and served demand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from capacity.model import Problem, slot
from capacity.optimize.program import Program
from capacity.requirements import Need

EPS = 1e-7


@dataclass(frozen=True)
class Shape:
    """Data shared by all steps of a problem."""

    quotas_of: list[list[int]]  # [pool]
    width: list[list[int]]  # [pool][service] GPUs
    rate: list[list[float]]  # [pool][service] units per second
    zone: list[str]  # [pool]
    spread: frozenset[int]  # services over several zones
    alike: list[list[int]]  # [place] pools
    cells_of: list[list[list[int]]]  # [service] pools it fits, grouped by type and zone


def shape(problem: Problem, need: Need, program: Program) -> Shape:
    """Compute the data shared by all steps, once per problem."""
    pools, services = problem.pools, problem.services
    widths = {gpus: [slot(s.gpus, gpus) for s in services] for gpus in {p.gpus for p in pools}}
    cells: dict[tuple[str, float, str, str, int], list[int]] = {}
    for p, pool in enumerate(pools):
        cells.setdefault((pool.gpu, pool.memory, pool.region, pool.zone, pool.gpus), []).append(p)
    together = list(cells.values())
    return Shape(
        quotas_of=[[q for q, quota in enumerate(problem.quotas) if quota.covers(pool)] for pool in pools],
        width=[widths[p.gpus] for p in pools],
        rate=need.rate.tolist(),
        zone=[f"{p.region}/{p.zone}" for p in pools],
        spread=frozenset(program.spread),
        cells_of=[[cell for cell in together if need.rate[cell[0], j] > 0] for j in range(len(services))],
        alike=[[p for p in range(len(pools)) if need.place[p] == k] for k in range(max(need.place) + 1)],
    )


@dataclass
class State:
    """A step under construction. `tenants[pool][service]` replicas, `blocks[pool][size]` idle blocks."""

    problem: Problem
    need: Need
    t: int
    before: list[int]  # instances held in the step before
    most: list[int]  # maximum instances per pool in this step
    n: list[int]
    free: list[int]
    tenants: list[dict[int, int]]
    blocks: list[dict[int, int]]
    served: list[float]
    by_zone: list[dict[str, float]]
    quota_left: list[int]  # GPUs
    least: list[int]  # minimum instances per pool
    shape: Shape
    # [service] units per second: to serve, thereof demand, maximum that counts as spare, and required without the largest zone
    target: list[float]
    base: list[float]
    cap: list[float]
    rest: list[float]
    with_blocks: dict[int, None] = field(default_factory=dict)  # pools; ordered, so that sums are reproducible

    def more(self, p: int) -> int:
        """Return how many more instances may be opened.

        Instances held before count towards a quota until all starts are done, so only starts use up the rest of a quota.
        """
        bound = self.most[p] - self.n[p]
        if not self.shape.quotas_of[p]:
            return bound
        again = max(0, self.before[p] - self.n[p])
        gpus = self.problem.pools[p].gpus
        starts = min(self.quota_left[q] // gpus for q in self.shape.quotas_of[p])
        return min(bound, again + max(0, starts))

    def room(self, p: int) -> int:
        """Return the GPUs that are free or on instances that may still be opened."""
        return self.free[p] + max(0, self.more(p)) * self.problem.pools[p].gpus

    def open(self, p: int, count: int = 1) -> None:
        """Open instances, or close them (negative `count`)."""
        gpus = self.problem.pools[p].gpus
        started = max(0, self.n[p] + count - self.before[p]) - max(0, self.n[p] - self.before[p])
        self.n[p] += count
        self.free[p] += gpus * count
        for q in self.shape.quotas_of[p]:
            self.quota_left[q] -= gpus * started

    def put(self, p: int, j: int, count: int) -> None:
        self.tenants[p][j] = self.tenants[p].get(j, 0) + count
        if not self.tenants[p][j]:
            del self.tenants[p][j]
        self.free[p] -= self.shape.width[p][j] * count
        self.served[j] += self.shape.rate[p][j] * count
        zone = self.shape.zone[p]
        self.by_zone[j][zone] = self.by_zone[j].get(zone, 0.0) + self.shape.rate[p][j] * count

    def zone_would_lack(self, j: int, q: int) -> bool:
        """Return whether a service with one more replica on pool q serves too little without its largest zone."""
        if j not in self.shape.spread:
            return False
        rest, rate, zones = self.rest[j], self.shape.rate[q][j], self.by_zone[j]
        largest = max(max(zones.values(), default=0.0), zones.get(self.shape.zone[q], 0.0) + rate)
        return self.served[j] + rate - largest < rest - EPS * max(1.0, rest)

    def surplus(self, j: int) -> float:
        """Return the rate beyond the plan that counts as spare, in units per second."""
        return min(self.cap[j], max(0.0, self.served[j] - self.base[j]))

    def covered(self, g: int) -> float:
        """Return the normalised GPUs of a group that surplus and idle blocks cover."""
        group = self.need.groups[g]
        total = 0.0
        for j, each in group.relief.items():
            over = self.served[j] - self.base[j]
            if over > 0:
                total += min(self.cap[j], over) * each
        for p in self.with_blocks:
            weight = group.weights.get(self.need.place[p])
            if weight is not None:
                for size, many in self.blocks[p].items():
                    if size >= weight[0]:
                        total += size * many * weight[1]
        return total

    def add_block(self, p: int, size: int, count: int) -> None:
        self.blocks[p][size] = self.blocks[p].get(size, 0) + count
        if not self.blocks[p][size]:
            del self.blocks[p][size]
        if self.blocks[p]:
            self.with_blocks[p] = None
        else:
            self.with_blocks.pop(p, None)
        self.free[p] -= size * count


def start(problem: Problem, need: Need, program: Program, t: int, before: list[int], shared: Shape) -> State:
    """Return the state of step `t` after `before` instances per pool, with the least instances open and nothing placed."""
    pools, count = problem.pools, len(problem.pools)
    bounds = slice(t * program.columns, t * program.columns + count)
    most = [
        int(min(10**9, upper, before[p] + pool.start_bound(t == 0)))
        for p, (pool, upper) in enumerate(zip(pools, program.upper[bounds], strict=True))
    ]
    state = State(
        problem=problem,
        need=need,
        t=t,
        before=before,
        most=most,
        n=[0] * count,
        free=[0] * count,
        tenants=[{} for _ in pools],
        blocks=[{} for _ in pools],
        served=[0.0] * len(problem.services),
        by_zone=[{} for _ in problem.services],
        quota_left=[
            quota.gpus - sum(pool.gpus * before[p] for p, pool in enumerate(pools) if quota.covers(pool))
            for quota in problem.quotas
        ],
        least=[int(v) for v in program.lower[bounds]],
        shape=shared,
        target=need.target[:, t].tolist(),
        base=need.base[:, t].tolist(),
        cap=need.cap[:, t].tolist(),
        rest=(need.typical[:, t] * problem.policy.zone_loss).tolist(),
    )
    for p, least in enumerate(state.least):
        if least:
            state.open(p, least)
    return state
