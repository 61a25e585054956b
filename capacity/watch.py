"""`--watch`: plan again on an interval, and let through only what hysteresis lets through.

Three gates, in this order, so that a plan neither oscillates nor scales down before up:
1. band: demand within `hysteresis.band` of what was last planned for counts as unchanged;
2. saving: when what is held keeps every constraint, a change must save more than `hysteresis.saving` of the cost;
3. hold_down: a stop must have been wanted for that long; starts pass at once, and come before stops.
What a provider refused bounds the next plan. The state is one small JSON file.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from capacity import plan as planning
from capacity.errors import CapacityError, InfeasibleError, InputError
from capacity.model import Demand, Forecast, Problem
from capacity.plan import Plan

APPLY_LIMIT = 600.0


@dataclass
class State:
    """What is remembered between plans. `planned`: demand at its quantiles, a service; `down_since`: a pool."""

    held: dict[str, int] = field(default_factory=dict)
    planned: dict[str, dict[str, Any]] = field(default_factory=dict)
    down_since: dict[str, float] = field(default_factory=dict)
    refused: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> State:
        """Raises InputError when the file is damaged; a missing one is a fresh start."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            state = cls(**raw)
            if not all(isinstance(v, int) and v >= 0 for v in state.held.values()):
                raise TypeError("held")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, AttributeError) as bad:
            raise InputError("bad-state", f"is damaged ({bad}); remove it to start afresh", file=str(path)) from bad
        return state

    def write(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(vars(self), file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)


@dataclass(frozen=True)
class Decision:
    """`starts` and `stops` are what passed the gates, instances a pool; `held_back` what did not and why."""

    plan: Plan
    starts: dict[str, int]
    stops: dict[str, int]
    held_back: dict[str, str]

    @property
    def quiet(self) -> bool:
        return not self.starts and not self.stops


def banded(problem: Problem, state: State) -> Problem:
    """The problem with the demand of services that moved within the band put back to what was planned for."""
    band = problem.policy.hysteresis.band
    forecasts: dict[str, Forecast] = {}
    for name, forecast in problem.demand.forecasts.items():
        before = state.planned.get(name)
        kept = forecast
        if before is not None:
            old = Forecast(tuple(before["levels"]), tuple(tuple(row) for row in before["values"]))
            if old.levels == forecast.levels and len(old.values[0]) == len(forecast.values[0]):
                then, now = np.array(old.values), np.array(forecast.values)
                if np.all(np.abs(now - then) <= band * then + 1e-12):
                    kept = old
        forecasts[name] = kept
    return replace(problem, demand=Demand(problem.demand.quantile, forecasts, problem.demand.history))


def decide(problem: Problem, state: State, now: float, *, exact: bool = False, limit: float = 60.0) -> Decision:
    """The plan and what of it may be done at `now` (seconds, any clock that does not go back). Changes `state` but for
    `held`. `limit`: seconds for each solve. Raises InfeasibleError, SolverError."""
    pools = tuple(
        replace(
            pool,
            held=state.held.get(pool.name, pool.held),
            refused=tuple(state.refused[pool.name][:2]) if pool.name in state.refused else pool.refused,  # type: ignore[arg-type]
        )
        for pool in problem.pools
    )
    problem = banded(replace(problem, pools=pools), state)
    solved = planning.solve(problem, exact=exact, limit=limit)
    held_back: dict[str, str] = {}
    wanted_starts = {p.name: int(n) for p, n in zip(pools, solved.starts[0], strict=True) if n}
    wanted_stops = {p.name: int(n) for p, n in zip(pools, solved.stops[0], strict=True) if n}
    if wanted_starts or wanted_stops:
        stay = _staying(problem)
        if stay is not None and stay.cost <= solved.cost * (1 + problem.policy.hysteresis.saving) + 1e-9:
            for name in {**wanted_starts, **wanted_stops}:
                held_back[name] = "saving"
            solved, wanted_starts, wanted_stops = stay, {}, {}
    stops: dict[str, int] = {}
    for pool in pools:
        if pool.name not in wanted_stops:
            state.down_since.pop(pool.name, None)
            continue
        since = state.down_since.setdefault(pool.name, now)
        if now - since >= problem.policy.hysteresis.hold_down:
            stops[pool.name] = wanted_stops[pool.name]
        else:
            held_back[pool.name] = "hold_down"
    state.planned = {
        name: {"levels": list(f.levels), "values": [list(row) for row in f.values]}
        for name, f in problem.demand.forecasts.items()
    }
    return Decision(solved, wanted_starts, stops, held_back)


def _staying(problem: Problem) -> Plan | None:
    """The plan that starts and stops nothing now, if it keeps every constraint."""
    try:
        return planning.solve(problem, stay=True, explained=False)
    except InfeasibleError:
        return None


def apply(decision: Decision, command: str, limit: float = APPLY_LIMIT) -> dict[str, int]:
    """Runs `command` in a shell with the delta as JSON on its standard input; it may print `{"granted": {pool: instances
    started}}`. Returns what was granted. Raises CapacityError when it fails or says something else."""
    delta = [{"action": "start", "pool": p, "count": n} for p, n in decision.starts.items()]
    delta += [{"action": "stop", "pool": p, "count": n} for p, n in decision.stops.items()]
    try:
        done = subprocess.run(
            command, shell=True, input=json.dumps({"delta": delta}), capture_output=True, text=True, timeout=limit
        )  # the user's own command, as in a shell
    except subprocess.TimeoutExpired as late:
        raise CapacityError("apply-timeout", f"the apply command took over {limit:g} s") from late
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise CapacityError("apply-failed", f"the apply command exited with {done.returncode}: {last}")
    granted = dict(decision.starts)
    if done.stdout.strip():
        try:
            said = json.loads(done.stdout)["granted"]
            for pool, count in said.items():
                if pool in granted and isinstance(count, int) and 0 <= count <= granted[pool]:
                    granted[pool] = count
        except (ValueError, KeyError, AttributeError, TypeError) as bad:
            raise CapacityError("apply-failed", "the apply command printed something other than its grants") from bad
    return granted


def record(state: State, problem: Problem, decision: Decision, granted: dict[str, int]) -> None:
    """What was done becomes what is held; what was refused bounds the next plan."""
    state.refused = {}
    for pool in problem.pools:
        held = state.held.get(pool.name, pool.held)
        asked, got = decision.starts.get(pool.name, 0), granted.get(pool.name, 0)
        state.held[pool.name] = max(0, held + got - decision.stops.get(pool.name, 0))
        if got < asked:
            state.refused[pool.name] = [asked, got]
        if pool.name in decision.stops:
            state.down_since.pop(pool.name, None)


def loop(
    load: Callable[[], Problem],
    state_path: Path,
    interval: float,
    stop: threading.Event,
    report: Callable[[Decision | CapacityError], None],
    *,
    command: str | None,
    rounds: int = 0,
    exact: bool = False,
    limit: float = 60.0,
) -> None:
    """Until `stop` is set, or for `rounds` plans. An error of one round (a file half written, no feasible plan) is reported
    and the next round tries again: nothing is changed meanwhile."""
    done = 0
    while not stop.is_set():
        began = time.monotonic()
        try:
            problem = load()
            state = State.read(state_path)
            decision = decide(problem, state, time.time(), exact=exact, limit=limit)
            if command is not None:
                granted = apply(decision, command) if not decision.quiet else {}
                record(state, problem, decision, granted)
            state.write(state_path)
            report(decision)
        except CapacityError as error:
            report(error)
        done += 1
        if rounds and done >= rounds:
            return
        stop.wait(max(0.0, interval - (time.monotonic() - began)))
