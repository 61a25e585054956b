"""Compute the requirements of a plan before solving: serving rate, hot spares and pooled idle GPUs, from demand and lead times.

For a service s with lead time L (a quantile of its samples), target wait W, and boot time B of the slowest pool it fits:
- Growth within (L - W) happens before a new replica can start: replicas that already run ("hot", not poolable) cover it.
- Growth within (B + L - W) can be covered by an idle GPU on which any service may start: pooled over services. Replicas
  that run beyond the plan (hot spares, and the surplus of rounding up) relieve the pool by at most what their own service
  adds to it.
A restored lead time below W needs no hot spare at all: this is the benefit of restoring. docs/capacity.md has the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from capacity.model import Floats, History, Kind, Problem, quantile, slot

MAX_GROUPS = 128
FEWEST = 40  # minimum number of past moments to choose
PoolKind = tuple[str, float, str, int]


@dataclass(frozen=True)
class Group:
    """Services whose growth is covered together by idle blocks of at least `size` GPUs per replica.

    `relief[service]`: normalised GPUs per unit per second of that service's own surplus, up to `Need.cap`.
    `weights[place]`: (slot size there, normalised GPUs per GPU of such a block). `required[step]`: normalised GPUs, i.e.
    GPUs of each service's own fastest place. Places are numbered as in `Need.place`.
    """

    name: str
    services: tuple[int, ...]
    size: int
    weights: dict[int, tuple[int, float]]
    relief: dict[int, float]
    required: Floats


@dataclass(frozen=True)
class Need:
    """The requirements of a problem.

    Arrays are [service, step] in units per second unless noted otherwise.
    """

    kind: Kind
    lead: Floats  # [service] seconds
    boot: Floats  # [pool] seconds
    loss: Floats  # [pool] extra cost of interruptions, as a share of the price
    rate: Floats  # [pool, service] rate of a replica; 0 if it does not fit
    typical: Floats  # demand to expect: the mean, or the median
    base: Floats  # quantile and headroom
    target: Floats  # base and hot spare
    hot: Floats
    cap: Floats  # maximum surplus that counts as spare: the growth of the service's own demand
    groups: tuple[Group, ...]
    place: tuple[int, ...]  # [pool] number of its place: pools that differ only in zone share one


def growth_samples(history: History, service: int, window: float) -> Floats:
    """Return, for every past moment t, the maximum rate over (t, t + window] minus the level at t, at least 0.

    A window shorter than a bin takes its share of one bin's growth. No window, or no past, gives zeros.
    """
    rates = history.rates[service]
    levels = rates if history.levels is None else history.levels[service]
    if window <= 0 or rates.size < 2:
        return np.zeros(max(1, rates.size - 1))
    width = max(1, int(np.ceil(window / history.bin_seconds - 1e-9)))
    width = min(width, rates.size - 1)
    peak = np.lib.stride_tricks.sliding_window_view(rates[1:], width).max(axis=1)
    # The last moments have seen only part of their window; count the part they have seen.
    tail = np.maximum.accumulate(rates[::-1])[: width - 1][::-1]
    share = min(1.0, window / history.bin_seconds)
    grown: Floats = np.maximum(0.0, np.concatenate([peak, tail]) - levels[:-1]) * share
    return grown


def _alike(history: History, members: tuple[int, ...], per_unit: Floats) -> npt.NDArray[np.int64] | None:
    """Return the indices of past moments whose level was nearest to the last one; None means all."""
    count = history.rates.shape[1] - 1
    wanted = max(FEWEST, int(history.nearest * count))
    if history.nearest >= 1.0 or wanted >= count:
        return None
    levels = history.rates if history.levels is None else history.levels
    ids = list(members)
    distance = (np.abs(levels[ids, :-1] - levels[ids, -1:]) * per_unit[ids][:, None]).sum(axis=0)
    return np.argpartition(distance, wanted)[:wanted]


def _spread(problem: Problem) -> tuple[Floats, Floats]:
    """Return the standard deviation and the upward trend to the next step, [service, step], from the forecast's quantiles."""
    sigma, trend = [], []
    for service in problem.services:
        forecast = problem.demand.forecasts[service.name]
        steps = problem.demand.steps
        median = forecast.at(0.5)[:steps]
        top = forecast.levels[-1]
        z = NormalDist().inv_cdf(top) if top > 0.5 else 0.0
        sigma.append(np.maximum(0.0, forecast.at(top)[:steps] - median) / z if z > 0 else np.zeros(steps))
        trend.append(np.maximum(0.0, np.append(median[1:], median[-1]) - median))
    return np.array(sigma), np.array(trend)


class Growth:
    """Estimates demand growth for one problem; reads the forecasts once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sigma, self.trend = _spread(problem)
        self.seen: dict[tuple[int, float], Floats] = {}

    def samples(self, history: History, service: int, window: float) -> Floats:
        key = (service, window)
        if key not in self.seen:
            self.seen[key] = growth_samples(history, service, window)
        return self.seen[key]

    def pooled(self, members: tuple[int, ...], windows: Floats, per_unit: Floats) -> tuple[Floats, Floats]:
        """Return the growth of the demand of `members` in normalised GPUs, [step], and each member's contribution, [member, step].

        The growth is at the largest target probability among the members; a contribution is what a member adds to the
        others. With a history: the quantile of the sum over the same moments, which preserves correlation. Without: the
        forecast's spread grows with the square root of time (a random walk), pooled with correlation rho, plus the trend.
        """
        problem = self.problem
        level = max(problem.services[s].probability for s in members)
        history = problem.demand.history
        if history is not None and history.rates.shape[1] >= 2:
            return self._learned(history, members, windows, per_unit, level)
        ids = list(members)
        scale = np.maximum(0.0, windows[ids][:, None] / problem.step_seconds)
        spread = self.sigma[ids] * np.sqrt(scale) * per_unit[ids][:, None]
        drift = self.trend[ids] * np.minimum(1.0, scale) * per_unit[ids][:, None]
        rho, z = problem.policy.correlation, max(0.0, NormalDist().inv_cdf(level))
        squares, total = (spread**2).sum(axis=0), spread.sum(axis=0)
        grown: Floats = z * np.sqrt((1 - rho) * squares + rho * total**2)
        others = (1 - rho) * np.maximum(0.0, squares - spread**2) + rho * np.maximum(0.0, total - spread) ** 2
        adds: Floats = grown - z * np.sqrt(others) + drift
        return grown + drift.sum(axis=0), adds

    def _learned(
        self, history: History, members: tuple[int, ...], windows: Floats, per_unit: Floats, level: float
    ) -> tuple[Floats, Floats]:
        steps = self.problem.demand.steps
        each = np.array([per_unit[s] * self.samples(history, s, float(windows[s])) for s in members])
        alike = _alike(history, members, per_unit)
        if alike is not None:
            each = each[:, alike]
        total = each.sum(axis=0)
        grown = float(np.quantile(total, level, method="higher"))
        if len(members) == 1:
            adds = np.array([grown])
        else:
            adds = grown - np.quantile(total - each, level, axis=1, method="higher")
        return np.full(steps, grown), np.repeat(np.maximum(0.0, adds)[:, None], steps, axis=1)


def _families(reach: list[frozenset[PoolKind]]) -> list[frozenset[PoolKind]]:
    """Return the sets of places for which a Hall condition is written, smallest first, at most MAX_GROUPS.

    These are the places that each service can use, closed under union of overlapping sets (disjoint unions follow by
    subadditivity).
    """
    found = list(dict.fromkeys(sorted(set(reach), key=lambda r: (len(r), sorted(map(repr, r))))))
    queue = list(found)
    seen = set(found)
    base = list(found)
    while queue and len(found) < MAX_GROUPS:
        current = queue.pop(0)
        for other in base:
            union = current | other
            if union not in seen and current & other:
                seen.add(union)
                found.append(union)
                queue.append(union)
    return found[:MAX_GROUPS]


def compute(problem: Problem, kind: Kind) -> Need:
    """Compute the requirements of a problem with cold or restored lead times."""
    policy, demand, steps = problem.policy, problem.demand, problem.demand.steps
    pools, services = problem.pools, problem.services
    lead = np.array([quantile(s.lead_samples(kind), policy.lead_quantile) for s in services])
    boot = np.array([quantile(p.boot, policy.lead_quantile) for p in pools])
    alike = {(p.gpu, p.memory, p.region): p for p in pools}
    rates = {k: [(s.rate_on(p.gpu) or 0.0) if s.fits(p) else 0.0 for s in services] for k, p in alike.items()}
    rate = np.array([rates[p.gpu, p.memory, p.region] for p in pools])
    # Cost of an interrupted instance while its replacement boots and its slowest service starts.
    slowest_lead = np.where(rate > 0, lead, 0.0).max(axis=1)
    loss = np.array([p.interruptions for p in pools]) * (boot + slowest_lead) / 3600
    wait = np.array([s.target_wait for s in services])
    slowest_boot = np.where(rate > 0, boot[:, None], 0.0).max(axis=0)
    hot_window = np.maximum(0.0, lead - wait)
    idle_window = np.maximum(0.0, slowest_boot + lead - wait)

    one = np.ones(len(services))
    growth = Growth(problem)
    hot = np.array([growth.pooled((j,), hot_window, one)[0] for j in range(len(services))])
    cap = np.array([growth.pooled((j,), idle_window, one)[0] for j in range(len(services))])
    typical = np.array([demand.forecasts[s.name].typical()[:steps] for s in services])
    planned = np.array([demand.forecasts[s.name].at(demand.quantile)[:steps] for s in services])
    base = planned * (1 + policy.headroom)
    places: list[PoolKind] = [(p.gpu, p.memory, p.region, p.gpus) for p in pools]
    number = {key: k for k, key in enumerate(dict.fromkeys(places))}
    groups = _groups(growth, places, number, rate, cap, idle_window)
    return Need(
        kind, lead, boot, loss, rate, typical, base, base + hot, hot, cap, groups, tuple(number[key] for key in places)
    )


def _groups(
    growth: Growth, place: list[PoolKind], number: dict[PoolKind, int], rate: Floats, cap: Floats, window: Floats
) -> tuple[Group, ...]:
    pools, services = growth.problem.pools, growth.problem.services
    first = [place.index(key) for key in number]  # one pool represents its place: all other attributes are equal
    width = np.array([[slot(s.gpus, pools[i].gpus) for s in services] for i in first], dtype=np.float64)
    density = rate[first] / width
    best = density.max(axis=0)
    per_unit = 1.0 / best
    keys = list(number)
    reach = [frozenset(keys[k] for k in np.flatnonzero(density[:, j] > 0)) for j in range(len(services))]
    groups: list[Group] = []
    seen: set[tuple[int, ...]] = set()
    for family in _families(reach):
        inside = [j for j in range(len(services)) if reach[j] <= family]
        for size in sorted({services[j].gpus for j in inside}):
            members = tuple(j for j in inside if services[j].gpus >= size)
            if members in seen:
                continue  # a larger family adds only places that none of these services can use
            seen.add(members)
            required, adds = growth.pooled(members, window, per_unit)
            if not np.any(required > 1e-9):
                continue
            ids = list(members)
            relative = np.where(density[:, ids] > 0, density[:, ids] / best[ids], np.inf).min(axis=1)
            weights = {
                int(k): (slot(size, pools[first[k]].gpus), float(relative[k]))
                for k in np.flatnonzero(np.isfinite(relative))
            }
            gpus = sorted({p[0] for p in family})
            regions = sorted({p[2] for p in family})
            own = cap[ids]
            ratio = np.where(own > 1e-9, adds / np.maximum(own, 1e-9), np.inf).min(axis=1)
            share = np.where(np.isfinite(ratio), np.minimum(ratio, per_unit[ids]), 0.0)
            relief = {j: float(v) for j, v in zip(members, share, strict=True) if v > 1e-9}
            names = ", ".join(services[j].name for j in members[:3]) + (", …" if len(members) > 3 else "")
            where = f" in {'/'.join(regions)}" if any(regions) else ""
            name = f"idle {'/'.join(gpus)}{where} for {names}"
            groups.append(Group(name, members, size, weights, relief, required))
    return tuple(groups)
