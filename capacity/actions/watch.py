"""The `--watch` loop: plan on an interval and apply only changes that pass hysteresis.

Three gates, in this order, prevent oscillation and scaling down before up:
1. band: demand within `hysteresis.band` of the last planned demand counts as unchanged.
2. saving: if the held instances satisfy every constraint, a change must save more than `hysteresis.saving` of the cost.
3. hold_down: a stop must have been wanted for that long. Starts pass at once and come before stops.

The loop is closed on the observed state: the held instances that `--observe` or the apply command reports, else the file's
`held` where it has changed, else the granted instances. A provider's refusal bounds the next plan, unless no feasible plan
is left: then the instances are requested again. If no plan satisfies every constraint, the plan covers as much of the demand
as they allow (capacity/optimize/best_effort.py), and nothing is stopped. The state is one small JSON file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from capacity.actions import apply as applying
from capacity.actions.apply import Applied
from capacity.errors import CapacityError, InfeasibleError, InputError, Waiting
from capacity.files import replacing
from capacity.model import Forecast, Problem
from capacity.optimize import plan as planning
from capacity.optimize.best_effort import best_effort
from capacity.optimize.plan import Plan

if TYPE_CHECKING:
    from capacity.cluster.controller import Controller
    from capacity.cluster.moves import Move

Count = Annotated[int, msgspec.Meta(ge=0)]
STANDBY_S = 2.0
"""How often one that waits for the Lease looks again, seconds."""
SHORT_EXIT = 1
"""Exit code if no plan satisfied every constraint in the last round."""


class State(msgspec.Struct, forbid_unknown_fields=True):
    """State kept between plans.

    `planned`: planned demand at its quantiles, per service. `down_since`: start of a wanted stop, per pool. `filed`: the
    file's own `held` when last read, per pool.
    """

    held: dict[str, Count] = {}
    planned: dict[str, dict[str, Any]] = {}
    down_since: dict[str, float] = {}
    refused: dict[str, list[int]] = {}
    filed: dict[str, Count] = {}

    @classmethod
    def read(cls, path: Path) -> State:
        """Read the state; a missing file gives an empty state.

        Raises InputError (bad-state) if the file is damaged.
        """
        try:
            return _STATE.decode(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as bad:
            raise InputError("bad-state", f"is damaged ({bad}); remove it to start afresh", file=str(path)) from bad

    def write(self, path: Path) -> None:
        """Write the state atomically. Raises CapacityError (state-not-written) if the disk refuses."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(msgspec.json.encode(self).decode())
        except OSError as bad:
            raise CapacityError(
                "state-not-written", f"{path}: {bad.strerror}; make room, or name another file with --state"
            ) from bad

    def observe(self, problem: Problem, seen: dict[str, int] | None) -> None:
        """Update the held instances from `seen`, in which missing pools hold none, or from the file.

        Without `seen`, takes the file's `held` of pools where it has changed since the last read. Forgets pools that the
        file no longer names. Raises CapacityError (observe-answer) if `seen` names an unknown pool.
        """
        named = {pool.name: pool.held for pool in problem.pools}
        if seen is not None:
            strange = sorted(seen.keys() - named.keys())
            if strange:
                known = ", ".join(named)
                raise CapacityError(
                    "observe-answer", f"the observe command names {strange[0]!r}; pools of the file: {known}"
                )
            self.held = {name: seen.get(name, 0) for name in named}
        else:
            self.held = {
                name: held if name not in self.held or self.filed.get(name, held) != held else self.held[name]
                for name, held in named.items()
            }
        self.filed = named


_STATE = msgspec.json.Decoder(State)


@dataclass(frozen=True)
class Decision:
    """Result of one planning round.

    `starts` and `stops` passed the gates, instances per pool; `blocked` maps pools to the gate that stopped them.
    `served`: if no plan satisfies every constraint (`conflict`), the share of its demand that each service gets.
    `moved` and `kept`: replicas that were changed in a cluster, and the gate that held back others, per object; None without one.
    """

    plan: Plan
    starts: dict[str, int]
    stops: dict[str, int]
    blocked: dict[str, str]
    served: dict[str, float] = field(default_factory=dict)
    conflict: InfeasibleError | None = None
    moved: tuple[Move, ...] | None = None
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def quiet(self) -> bool:
        return not self.starts and not self.stops


def banded(problem: Problem, state: State) -> Problem:
    """Return the problem with demand that moved within the band reset to the planned demand."""
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
                    mean = before.get("mean", forecast.mean)  # older states have none
                    kept = replace(forecast, values=old.values, mean=None if mean is None else tuple(mean))
        forecasts[name] = kept
    return replace(problem, demand=replace(problem.demand, forecasts=forecasts))


def decide(problem: Problem, state: State, now: float, *, exact: bool = False, limit: float = 60.0) -> Decision:
    """Plan, and apply the gates at time `now` (seconds, any monotonic clock).

    Changes `state`, except `held`. `limit`: seconds for each solve. Raises InfeasibleError if not even a plan for less
    demand exists, SolverError.
    """
    pools = tuple(
        replace(
            pool,
            held=state.held.get(pool.name, pool.held),
            refused=tuple(state.refused[pool.name][:2]) if pool.name in state.refused else pool.refused,  # type: ignore[arg-type]
        )
        for pool in problem.pools
    )
    problem = banded(replace(problem, pools=pools), state)
    solved, conflict, served = _solve(problem, exact, limit)
    blocked: dict[str, str] = {}
    wanted_starts = {p.name: int(n) for p, n in zip(pools, solved.starts[0], strict=True) if n}
    wanted_stops = {p.name: int(n) for p, n in zip(pools, solved.stops[0], strict=True) if n}
    if conflict is not None:
        blocked |= dict.fromkeys(wanted_stops, "shortage")
        wanted_stops = {}
    elif wanted_starts or wanted_stops:
        stay = _staying(solved.problem, limit)
        if stay is not None and stay.cost <= solved.cost * (1 + problem.policy.hysteresis.saving) + 1e-9:
            for name in {**wanted_starts, **wanted_stops}:
                blocked[name] = "saving"
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
            blocked[pool.name] = "hold_down"
    state.planned = {
        name: {"levels": f.levels, "values": f.values, "mean": f.mean} for name, f in problem.demand.forecasts.items()
    }
    return Decision(solved, wanted_starts, stops, blocked, served, conflict)


def _solve(problem: Problem, exact: bool, limit: float) -> tuple[Plan, InfeasibleError | None, dict[str, float]]:
    """Solve; if infeasible, retry without refusals, then for less demand.

    Returns the plan, the conflict and the served shares.
    """
    try:
        return planning.solve(problem, exact=exact, limit=limit), None, {}
    except InfeasibleError as bad:
        conflict = bad
    if any(pool.refused is not None for pool in problem.pools):
        problem = replace(problem, pools=tuple(replace(pool, refused=None) for pool in problem.pools))
        try:
            return planning.solve(problem, exact=exact, limit=limit), None, {}
        except InfeasibleError as bad:
            conflict = bad
    try:
        solved, served = best_effort(problem, limit=limit)
    except InfeasibleError:
        raise conflict from None
    return solved, conflict, served


def _staying(problem: Problem, limit: float) -> Plan | None:
    """Return the plan that starts and stops nothing now, or None if it violates a constraint."""
    try:
        return planning.solve(problem, stay=True, explained=False, limit=limit)
    except InfeasibleError:
        return None


def record(state: State, problem: Problem, decision: Decision, done: Applied) -> None:
    """Update the state with an apply command's result: held instances, and refusals that bound the next plan.

    Reported held instances override computed ones.
    """
    state.refused = {}
    for pool in problem.pools:
        held = state.held.get(pool.name, pool.held)
        asked, got = decision.starts.get(pool.name, 0), done.granted.get(pool.name, 0)
        state.held[pool.name] = done.held.get(pool.name, max(0, held + got - done.stopped.get(pool.name, 0)))
        # A failed command refused nothing: request again what it did not do.
        if got < asked and done.error is None:
            state.refused[pool.name] = [asked, got]
        if pool.name in done.stopped:
            state.down_since.pop(pool.name, None)


def loop(
    load: Callable[[], Problem],
    state_path: Path,
    interval: float,
    stop: threading.Event,
    report: Callable[[Decision | CapacityError], None],
    *,
    command: str | None,
    observe: str | None = None,
    rounds: int = 0,
    exact: bool = False,
    limit: float = 60.0,
    controller: Controller | None = None,
) -> int:
    """Run until `stop` is set, or for `rounds` plans; return the exit code of the last round.

    An error in a round (a partially written file, a failed command) is reported, and the next round tries again. The state
    file is read once and kept in memory after that. It is also written before applying, so that nothing is applied whose outcome
    could not be recorded. `controller`: applies plans to a cluster, in place of `command`.
    """
    done = code = 0
    state: State | None = None
    waited_for = ""
    while not stop.is_set():
        began, pause = time.monotonic(), interval
        try:
            if controller is not None and not controller.wait_for_lease():
                lease = controller.leadership
                text = f"{lease.holder or 'another one'} holds the Lease {lease.namespace}/{lease.name}; waiting for it"
                raise Waiting("standing-by", text)
            problem = load()
            if state is None:
                state = State.read(state_path)
            seen = None
            if controller is not None:
                seen, problem = controller.observe(problem)
                state.refused = controller.refused(problem, seen)
            held = None if seen is None else seen.held
            state.observe(problem, applying.observe(observe, stop=stop) if observe is not None else held)
            decision = decide(problem, state, time.time(), exact=exact, limit=limit)
            state.write(state_path)
            error = None
            if controller is not None and seen is not None:
                wrote = controller.apply(decision.plan, seen, short=decision.conflict is not None)
                decision = replace(decision, moved=wrote.moved, kept=wrote.blocked)
                for failure in wrote.errors[1:]:
                    report(failure)
                error = wrote.errors[0] if wrote.errors else None
            if command is not None:
                outcome = Applied({}, {}, {})
                if not decision.quiet:
                    outcome = applying.apply(decision.starts, decision.stops, command, stop=stop)
                record(state, problem, decision, outcome)
                error = outcome.error
            waited_for = ""
            report(decision)
            if error is not None:
                report(error)
            code = error.exit_code if error is not None else SHORT_EXIT if decision.conflict is not None else 0
            state.write(state_path)
        except CapacityError as bad:
            code = bad.exit_code
            if str(bad) != waited_for:
                report(bad)
            waited_for = str(bad) if isinstance(bad, Waiting) else ""
            if bad.code == "standing-by":
                pause = min(interval, STANDBY_S)
        done += 1
        if rounds and done >= rounds:
            break
        stop.wait(max(0.0, pause - (time.monotonic() - began)))
    return code
