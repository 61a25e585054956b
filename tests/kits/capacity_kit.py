"""Random problems, and the integer program written down a second time, row by row, for scipy's solver.

`naive` is made from docs/capacity.md and shares nothing with capacity/optimize/program.py: zones as one row a zone left out, demand and
idle
GPUs as stated, no rounding up, no counted rows, dense dictionaries.
"""

from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from capacity import requirements
from capacity.model import Demand, Forecast, Policy, Pool, Problem, Quota, Service, Share, slot

TYPES = (("H100", 8, 80.0, 24.0), ("L40S", 4, 48.0, 5.6), ("A100", 8, 80.0, 14.0))


def random_problem(seed, *, pools=None, services=None, steps=None):
    """A small problem that is usually feasible. The same seed gives the same problem."""
    random = np.random.default_rng(seed)
    pools = int(random.integers(1, 5)) if pools is None else pools
    services = int(random.integers(1, 4)) if services is None else services
    steps = int(random.integers(1, 3)) if steps is None else steps
    types = random.permutation(len(TYPES))[: int(random.integers(1, 3))]
    made = []
    for i in range(pools):
        gpu, gpus, memory, price = TYPES[types[i % len(types)]]
        made.append(
            Pool(
                f"p{i}", f"{gpus}x{gpu}", gpu, gpus, memory, f"r{int(random.integers(2))}", f"z{int(random.integers(2))}",
                round(price * float(random.uniform(0.8, 1.2)), 2),
                quota=int(random.integers(6, 30)),
                supply=int(random.integers(4, 30)) if random.random() < 0.5 else None,
                held=int(random.integers(0, 4)),
                boot=tuple(float(v) for v in random.uniform(30, 300, 3)),
                interruptions=float(random.choice([0.0, 0.01, 0.2])),
                refused=(5, int(random.integers(3, 6))) if random.random() < 0.1 else None,
            )
        )  # fmt: skip
    listed, forecasts = [], {}
    for j in range(services):
        gpus = int(random.choice([1, 1, 2, 4, 3]))
        rates = {"H100": 10.0, "A100": 6.0, "L40S": 3.0} if random.random() < 0.6 else {"*": 5.0}
        listed.append(
            Service(
                f"s{j}", gpus, rates,
                cold=tuple(float(v) for v in random.uniform(30, 200, 3)),
                restored=tuple(float(v) for v in random.uniform(0.5, 3, 3)),
                memory=float(random.choice([20.0, 40.0])),
                target_wait=float(random.choice([0.0, 2.0, 30.0])),
                probability=float(random.choice([0.9, 0.99])),
                minimum=int(random.integers(0, 2)),
                maximum=None if random.random() < 0.8 else 40,
            )
        )  # fmt: skip
        median = random.uniform(2, 25, steps)
        forecasts[f"s{j}"] = Forecast((0.5, 0.9), (tuple(median.tolist()), tuple((median * 1.3).tolist())))
    regions = {p.region for p in made}
    mix = {}
    if len(regions) > 1 and random.random() < 0.3:
        mix = {"r0": Share(0.2, 0.9)}
    policy = Policy(
        headroom=0.1,
        region_mix=mix,
        switching_cost=float(random.choice([0.0, 0.1, 1.0])),
        zone_loss=float(random.choice([0.0, 0.5, 1.0])),
        max_start=None if random.random() < 0.8 else 12,
        max_stop=None if random.random() < 0.8 else 6,
    )
    quotas = ()
    if random.random() < 0.3:
        quotas = (Quota("q", made[0].gpu, None, made[0].gpus * int(random.integers(8, 20))),)
    return Problem(tuple(made), tuple(listed), Demand(0.9, forecasts), policy, quotas)


class _Rows:
    def __init__(self):
        self.names, self.entries, self.low, self.high = {}, [], [], []

    def col(self, *key):
        return self.names.setdefault(key, len(self.names))

    def row(self, terms, low=-np.inf, high=np.inf):
        for key, value in terms:
            self.entries.append((len(self.low), self.col(*key), value))
        self.low.append(low)
        self.high.append(high)


def naive(problem, kind="restored", required=None):
    """The optimum by scipy's milp, dollars; None when infeasible."""
    required = requirements.compute(problem, kind) if required is None else required
    pools, services, policy = problem.pools, problem.services, problem.policy
    rows = _Rows()
    cost, integer, upper = {}, set(), {}
    hours = problem.step_seconds / 3600
    sizes = {
        (i, w)
        for g in required.groups
        for i in range(len(pools))
        for k, (w, _) in g.weights.items()
        if required.place[i] == k
    }
    for t in range(problem.demand.steps):
        pairs = [(i, j) for i, p in enumerate(pools) for j, s in enumerate(services) if s.fits(p)]
        for i, pool in enumerate(pools):
            n, u = ("n", i, t), ("u", i, t)
            cost[rows.col(*n)] = pool.price * hours * (1 + required.loss[i])
            cost[rows.col(*u)] = pool.price * policy.switching_cost
            integer.add(rows.col(*n))
            upper[rows.col(*n)] = np.inf if pool.quota is None else pool.quota
            bound = np.inf if pool.supply is None else pool.supply
            if t == 0 and pool.refused is not None and pool.refused[1] < pool.refused[0]:
                bound = min(bound, pool.refused[1])
            upper[rows.col(*u)] = bound
            used = [(("x", i, j, t), -float(slot(services[j].gpus, pool.gpus))) for k, j in pairs if k == i]
            used += [(("b", i, w, t), -float(w)) for k, w in sizes if k == i]
            rows.row([(n, float(pool.gpus)), *used], low=0.0)
            if t == 0:
                rows.row([(u, 1.0), (n, -1.0)], low=-float(pool.held))
            else:
                rows.row([(u, 1.0), (n, -1.0), (("n", i, t - 1), 1.0)], low=0.0)
        for i, j in pairs:
            integer.add(rows.col("x", i, j, t))
        for i, w in sizes:
            integer.add(rows.col("b", i, w, t))
        for j, service in enumerate(services):
            mine = [(i, j2) for i, j2 in pairs if j2 == j]
            served = [(("x", i, j, t), service.rate_on(pools[i].gpu)) for i, _ in mine]
            rows.row(served, low=float(required.target[j, t]))
            count = [(("x", i, j, t), 1.0) for i, _ in mine]
            rows.row(count, low=service.minimum, high=np.inf if service.maximum is None else service.maximum)
            upper[rows.col("h", j, t)] = float(required.cap[j, t])
            rows.row([(("h", j, t), -1.0), *served], low=float(required.base[j, t]))
            zones = {(pools[i].region, pools[i].zone) for i, _ in mine}
            if policy.zone_loss > 0 and len(zones) > 1:
                for zone in zones:
                    rest = [
                        (("x", i, j, t), service.rate_on(pools[i].gpu))
                        for i, _ in mine
                        if (pools[i].region, pools[i].zone) != zone
                    ]
                    rows.row(rest, low=policy.zone_loss * float(required.typical[j, t]))
        for group in required.groups:
            terms = [(("h", j, t), each) for j, each in group.relief.items()]
            for i, w in sizes:
                weight = group.weights.get(required.place[i])
                if weight is not None and w >= weight[0]:
                    terms.append((("b", i, w, t), w * weight[1]))
            rows.row(terms, low=float(group.required[t]))
        for quota in problem.quotas:
            inside = [i for i, p in enumerate(pools) if quota.covers(p)]
            rows.row([(("n", i, t), float(pools[i].gpus)) for i in inside], high=float(quota.gpus))
            begun = [(("u", i, t), float(pools[i].gpus)) for i in inside]
            if t == 0:
                rows.row(begun, high=max(0.0, quota.gpus - sum(pools[i].gpus * pools[i].held for i in inside)))
            else:
                rows.row(begun + [(("n", i, t - 1), float(pools[i].gpus)) for i in inside], high=float(quota.gpus))
        for region, share in policy.region_mix.items():
            rows.row(
                [(("n", i, t), p.gpus * ((p.region == region) - share.least)) for i, p in enumerate(pools)], low=0.0
            )
            rows.row(
                [(("n", i, t), p.gpus * ((p.region == region) - share.most)) for i, p in enumerate(pools)], high=0.0
            )
        if policy.max_start is not None:
            rows.row([(("u", i, t), 1.0) for i in range(len(pools))], high=policy.max_start)
        if policy.max_stop is not None:
            terms = [(("u", i, t), 1.0) for i in range(len(pools))] + [(("n", i, t), -1.0) for i in range(len(pools))]
            if t:
                terms += [(("n", i, t - 1), 1.0) for i in range(len(pools))]
            rows.row(terms, high=policy.max_stop - (0 if t else sum(p.held for p in pools)))
    width = len(rows.names)
    r, c, v = zip(*rows.entries, strict=True)
    matrix = coo_matrix((v, (r, c)), shape=(len(rows.low), width)).tocsr()
    answer = milp(
        [cost.get(k, 0.0) for k in range(width)],
        integrality=[int(k in integer) for k in range(width)],
        bounds=Bounds(np.zeros(width), np.array([upper.get(k, np.inf) for k in range(width)])),
        constraints=LinearConstraint(matrix, rows.low, rows.high),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if answer.status == 2:
        return None
    assert answer.status == 0, answer.message
    return float(answer.fun)


def scaled(problem, factor):
    return replace(problem, pools=tuple(replace(p, price=p.price * factor) for p in problem.pools))
