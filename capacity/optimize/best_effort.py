"""Plan for as much of the demand as the constraints allow, if no plan satisfies all of it.

First, bisection finds one share by which every service's demand is scaled down. Then each service is raised back to its
full demand if the others stay feasible. Quotas, supply, limits and region shares are never violated.
Whether a plan exists is all that counts until the shares are found, so the plans before the last one are only constructed.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from capacity.errors import InfeasibleError
from capacity.model import Forecast, History, Problem
from capacity.optimize import plan as planning
from capacity.optimize.plan import Plan

RESOLUTION = 1 / 64
"""Share of the demand at which the bisection ends."""


def scaled(problem: Problem, shares: dict[str, float]) -> Problem:
    """Scale each service's demand, history and minimum replicas by its share (1 if missing)."""
    forecasts = {name: _times(forecast, shares.get(name, 1.0)) for name, forecast in problem.demand.forecasts.items()}
    services = tuple(replace(s, minimum=math.floor(s.minimum * shares.get(s.name, 1.0))) for s in problem.services)
    history = problem.demand.history
    if history is not None:
        factor = np.array([shares.get(s.name, 1.0) for s in problem.services])[:, None]
        levels = None if history.levels is None else history.levels * factor
        history = History(history.bin_seconds, history.rates * factor, levels, history.nearest)
    return replace(problem, services=services, demand=replace(problem.demand, forecasts=forecasts, history=history))


def _times(forecast: Forecast, share: float) -> Forecast:
    values = tuple(tuple(v * share for v in row) for row in forecast.values)
    return replace(
        forecast, values=values, mean=None if forecast.mean is None else tuple(v * share for v in forecast.mean)
    )


def best_effort(problem: Problem, *, limit: float = 60.0) -> tuple[Plan, dict[str, float]]:
    """Return the plan, and the share of its demand that each service gets.

    `limit`: seconds per solve, and in total for raising single services. Raises InfeasibleError if even zero demand has no plan.
    """

    def plan(shares: dict[str, float], *, quick: bool = False) -> Plan:
        return planning.solve(scaled(problem, shares), quick=quick, explained=False, limit=limit)

    def feasible(shares: dict[str, float]) -> bool:
        try:
            plan(shares, quick=True)
        except InfeasibleError:
            return False
        return True

    names = [service.name for service in problem.services]
    low, high = 0.0, 1.0
    plan(dict.fromkeys(names, 0.0), quick=True)
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        if feasible(dict.fromkeys(names, middle)):
            low = middle
        else:
            high = middle
    shares = dict.fromkeys(names, low)
    deadline = time.monotonic() + limit
    for name in names if len(names) > 1 else ():
        if time.monotonic() > deadline:
            break
        if feasible(shares | {name: 1.0}):
            shares[name] = 1.0
    return replace(plan(shares), problem=problem), shares
