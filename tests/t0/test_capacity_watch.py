"""Hysteresis: a wobble changes nothing, starts pass at once, stops wait, refusals bound the next plan."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from capacity import watch
from capacity.errors import CapacityError, InfeasibleError, InputError
from capacity.model import Hysteresis
from tests.t0.capacity_kit import random_problem

pytestmark = pytest.mark.t0


def moved(problem, factor):
    """The problem with demand times `factor(service, step)`."""
    forecasts = {
        name: replace(f, values=tuple(tuple(v * factor(name, t) for t, v in enumerate(row)) for row in f.values))
        for name, f in problem.demand.forecasts.items()
    }
    return replace(problem, demand=replace(problem.demand, forecasts=forecasts))


def quiet_pools(problem):
    return replace(problem, pools=tuple(replace(p, refused=None) for p in problem.pools))


@given(st.integers(0, 2**31), st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_plan_is_stable_under_a_wobble_inside_the_band(seed, data):
    problem = quiet_pools(random_problem(seed, steps=1))
    problem = replace(
        problem, policy=replace(problem.policy, hysteresis=Hysteresis(0.05, 0.02, 0.0), max_start=None, max_stop=None)
    )
    state = watch.State()
    for turn in range(3):  # until supply lets everything start
        try:
            decision = watch.decide(problem, state, float(turn))
        except InfeasibleError:
            assume(False)
        watch.record(state, problem, decision, dict(decision.starts))
    held = dict(state.held)
    for turn in range(3, 6):
        wobble = data.draw(st.floats(0.951, 1.049))
        decision = watch.decide(moved(problem, lambda *_, w=wobble: w), state, float(turn))
        assert decision.quiet, (decision.starts, decision.stops)
        watch.record(state, problem, decision, {})
    assert state.held == held


def steady(seed=5, **hysteresis):
    problem = quiet_pools(random_problem(seed, pools=1, services=1, steps=1))
    policy = replace(problem.policy, hysteresis=Hysteresis(**hysteresis), zone_loss=0.0, max_start=None, max_stop=None)
    pool = replace(problem.pools[0], quota=None, supply=None, held=0)
    return replace(problem, pools=(pool,), policy=policy)


def test_a_drift_leaves_the_band_where_it_was_planned_not_where_it_was_last_seen():
    """Ten steps of 2 % are not ten wobbles: at the third the plan follows."""
    problem = steady(band=0.05, saving=0.0, hold_down=0.0)
    state = watch.State()
    watch.decide(problem, state, 0.0)
    planned = [state.planned["s0"]["values"][0][0]]
    for turn in range(1, 5):
        watch.decide(moved(problem, lambda *_, k=turn: 1.02**k), state, float(turn))
        planned.append(state.planned["s0"]["values"][0][0])
    assert planned[0] == planned[1] == planned[2]
    assert planned[3] == pytest.approx(planned[0] * 1.02**3)
    assert planned[4] == planned[3]


def test_starts_pass_at_once_and_stops_wait():
    problem = steady(band=0.05, saving=0.0, hold_down=300.0)
    state = watch.State()
    first = watch.decide(problem, state, 0.0)
    assert first.starts
    watch.record(state, problem, first, dict(first.starts))
    less = moved(problem, lambda *_: 0.3)
    for now in (10.0, 200.0, 309.0):
        waiting = watch.decide(less, state, now)
        assert waiting.stops == {}
        assert waiting.held_back == {"p0": "hold_down"}
        watch.record(state, less, waiting, {})
    late = watch.decide(less, state, 310.0)
    assert late.stops["p0"] > 0
    watch.record(state, less, late, {})
    assert state.held["p0"] == int(late.plan.instances[0, 0])


def test_a_need_that_comes_back_starts_the_clock_again():
    problem = steady(band=0.05, saving=0.0, hold_down=300.0)
    state = watch.State()
    first = watch.decide(problem, state, 0.0)
    watch.record(state, problem, first, dict(first.starts))
    less = moved(problem, lambda *_: 0.3)
    watch.decide(less, state, 10.0)
    watch.decide(problem, state, 100.0)
    assert watch.decide(less, state, 320.0).stops == {}


def test_a_saving_that_is_too_small_is_held_back():
    problem = steady(band=0.0, saving=0.0, hold_down=0.0)
    state = watch.State()
    first = watch.decide(problem, state, 0.0)
    watch.record(state, problem, first, dict(first.starts))
    state.held["p0"] += 1
    greedy = watch.State(dict(state.held))
    assert watch.decide(problem, greedy, 1.0).stops == {"p0": 1}
    lazy = replace(problem, policy=replace(problem.policy, hysteresis=Hysteresis(0.0, 0.99, 0.0)))
    decision = watch.decide(lazy, state, 1.0)
    assert decision.quiet
    assert decision.held_back == {"p0": "saving"}


def test_what_a_provider_refused_bounds_the_next_plan():
    problem = steady(band=0.05, saving=0.0, hold_down=0.0)
    state = watch.State()
    first = watch.decide(problem, state, 0.0)
    asked = first.starts["p0"]
    assert asked > 1
    watch.record(state, problem, first, {"p0": 1})
    assert state.refused == {"p0": [asked, 1]}
    with pytest.raises(InfeasibleError) as caught:
        watch.decide(problem, state, 1.0)
    if asked > 2:
        assert any("supply of pool p0, 1 starts" in text for text in caught.value.conflict.constraints)


def test_the_state_survives_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "deep" / "state.json"
    state = watch.State({"a": 3}, {}, {"a": 1.5}, {"a": [3, 1]})
    state.write(path)
    assert watch.State.read(path) == state
    assert path.stat().st_mode & 0o777 == 0o600
    assert watch.State.read(tmp_path / "none.json") == watch.State()
    for text in ("{", "[]", '{"held": {"a": -1}}', '{"strange": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="remove it"):
            watch.State.read(path)


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 3", "apply-failed"), ("echo nonsense", "apply-failed"), ("sleep 5", "apply-timeout")],
)
def test_an_apply_command_that_fails_says_so(command, code):
    problem = steady()
    decision = watch.decide(problem, watch.State(), 0.0)
    with pytest.raises(CapacityError) as caught:
        watch.apply(decision, command, limit=0.3 if "sleep" in command else 20.0)
    assert caught.value.code == code


def test_an_apply_command_gets_starts_before_stops_and_may_grant_less(tmp_path):
    problem = steady()
    decision = replace(watch.decide(problem, watch.State(), 0.0), stops={"old": 2})
    seen = tmp_path / "seen.json"
    granted = watch.apply(decision, f'cat > {seen}; echo \'{{"granted": {{"p0": 1, "unknown": 7}}}}\'')
    delta = json.loads(seen.read_text())["delta"]
    assert [entry["action"] for entry in delta] == ["start", "stop"]
    assert granted == {"p0": 1}
