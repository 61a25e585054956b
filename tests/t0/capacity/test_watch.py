"""Hysteresis: a wobble changes nothing, starts pass at once, stops wait, refusals bound the next plan."""

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from capacity.actions import watch
from capacity.actions.apply import Applied, apply, observe
from capacity.errors import CapacityError, InfeasibleError, InputError
from capacity.model import Hysteresis
from capacity.optimize import plan as planning
from capacity.optimize.best_effort import best_effort, scaled
from tests.kits.capacity_kit import random_problem

pytestmark = pytest.mark.t0


def moved(problem, factor):
    """The problem with demand times `factor(service, step)`."""
    forecasts = {
        name: replace(f, values=tuple(tuple(v * factor(name, t) for t, v in enumerate(row)) for row in f.values))
        for name, f in problem.demand.forecasts.items()
    }
    return replace(problem, demand=replace(problem.demand, forecasts=forecasts))


def with_mean(problem, mean):
    forecasts = {name: replace(f, mean=(mean,) * len(f.values[0])) for name, f in problem.demand.forecasts.items()}
    return replace(problem, demand=replace(problem.demand, forecasts=forecasts))


def done(decision, granted=None):
    """What a command did that did all of it, or started `granted` only."""
    return Applied(dict(decision.starts) if granted is None else granted, dict(decision.stops), {})


@pytest.fixture
def solves(monkeypatch):
    """The options of each solve."""
    found, real = [], planning.solve
    monkeypatch.setattr(planning, "solve", lambda *given, **options: found.append(options) or real(*given, **options))
    return found


def test_shares_are_found_by_constructed_plans_and_the_last_one_is_improved(solves):
    problem = random_problem(7020, pools=5, services=1, steps=12)
    pools = tuple(replace(pool, quota=1, held=0) for pool in problem.pools)
    short = moved(replace(problem, pools=pools), lambda *_: 20.0)
    plan, shares = best_effort(short)
    assert all(0.0 < share < 1.0 for share in shares.values())
    assert [one["quick"] for one in solves] == [True] * 7 + [False]
    assert plan.cost == planning.solve(scaled(short, shares), explained=False).cost


def test_every_solve_of_a_round_has_the_limit_that_was_given(solves):
    problem = moved(random_problem(1, steps=1), lambda *_: 1.0)
    assert not watch.decide(problem, watch.State(), 0.0, limit=7.0).conflict
    assert [one["limit"] for one in solves] == [7.0, 7.0] and solves[1]["stay"]


def test_the_expected_demand_is_kept_and_scaled_with_the_quantiles():
    problem = with_mean(random_problem(1, steps=1), 3.0)
    state = watch.State()
    state.planned = {
        name: {"levels": f.levels, "values": f.values, "mean": f.mean} for name, f in problem.demand.forecasts.items()
    }
    for forecast in watch.banded(with_mean(problem, 4.0), state).demand.forecasts.values():
        assert forecast.mean == (3.0,)
    for planned in state.planned.values():
        del planned["mean"]  # the state of an older version
    for forecast in watch.banded(with_mean(problem, 4.0), state).demand.forecasts.values():
        assert forecast.mean == (4.0,)
    halves = dict.fromkeys(problem.demand.forecasts, 0.5)
    for forecast in scaled(problem, halves).demand.forecasts.values():
        assert forecast.mean == (1.5,)


def quiet_pools(problem):
    return replace(problem, pools=tuple(replace(p, refused=None) for p in problem.pools))


@pytest.mark.slow
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
        assume(decision.conflict is None)
        watch.record(state, problem, decision, done(decision))
    held = dict(state.held)
    for turn in range(3, 6):
        wobble = data.draw(st.floats(0.951, 1.049))
        decision = watch.decide(moved(problem, lambda *_, w=wobble: w), state, float(turn))
        assert decision.quiet, (decision.starts, decision.stops)
        watch.record(state, problem, decision, done(decision))
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
    watch.record(state, problem, first, done(first))
    less = moved(problem, lambda *_: 0.3)
    for now in (10.0, 200.0, 309.0):
        waiting = watch.decide(less, state, now)
        assert waiting.stops == {}
        assert waiting.blocked == {"p0": "hold_down"}
        watch.record(state, less, waiting, done(waiting))
    late = watch.decide(less, state, 310.0)
    assert late.stops["p0"] > 0
    watch.record(state, less, late, done(late))
    assert state.held["p0"] == int(late.plan.instances[0, 0])


def test_a_need_that_comes_back_starts_the_clock_again():
    problem = steady(band=0.05, saving=0.0, hold_down=300.0)
    state = watch.State()
    first = watch.decide(problem, state, 0.0)
    watch.record(state, problem, first, done(first))
    less = moved(problem, lambda *_: 0.3)
    watch.decide(less, state, 10.0)
    watch.decide(problem, state, 100.0)
    assert watch.decide(less, state, 320.0).stops == {}


def test_a_saving_that_is_too_small_is_held_back():
    problem = steady(band=0.0, saving=0.0, hold_down=0.0)
    state = watch.State()
    first = watch.decide(problem, state, 0.0)
    watch.record(state, problem, first, done(first))
    state.held["p0"] += 1
    greedy = watch.State(dict(state.held))
    assert watch.decide(problem, greedy, 1.0).stops == {"p0": 1}
    lazy = replace(problem, policy=replace(problem.policy, hysteresis=Hysteresis(0.0, 0.99, 0.0)))
    decision = watch.decide(lazy, state, 1.0)
    assert decision.quiet
    assert decision.blocked == {"p0": "saving"}


def two_pools():
    """One service on a cheap pool and on a dear one, both without bounds."""
    problem = steady(band=0.05, saving=0.0, hold_down=0.0)
    dear = replace(problem.pools[0], name="dear", instance="dear", price=problem.pools[0].price * 3)
    return replace(problem, pools=(problem.pools[0], dear))


def test_what_a_provider_refused_bounds_the_next_plan():
    problem, state = two_pools(), watch.State()
    first = watch.decide(problem, state, 0.0)
    asked = first.starts["p0"]
    watch.record(state, problem, first, done(first, {"p0": 0}))
    assert state.refused == {"p0": [asked, 0]}
    assert watch.decide(problem, state, 1.0).starts == {"dear": asked}


def test_after_a_full_refusal_without_an_alternative_the_same_is_asked_for_again(tmp_path):
    """The refusal is not for ever: not in this process, and not in the next one that reads the state."""
    problem, path, state = steady(band=0.05, saving=0.0, hold_down=0.0), tmp_path / "state.json", watch.State()
    first = watch.decide(problem, state, 0.0)
    watch.record(state, problem, first, done(first, {"p0": 0}))
    state.write(path)
    for turn in range(1, 4):
        state = watch.State.read(path)
        again = watch.decide(problem, state, float(turn))
        assert again.starts == first.starts
        assert again.conflict is None
        watch.record(state, problem, again, done(again, {"p0": 0}))
        state.write(path)


def test_where_no_plan_is_possible_as_much_as_possible_is_started_and_nothing_stopped():
    problem = steady(band=0.05, saving=0.0, hold_down=0.0)
    wanted = watch.decide(problem, watch.State(), 0.0).starts["p0"]
    assert wanted > 2
    tight = replace(problem, pools=(replace(problem.pools[0], quota=wanted - 1),))
    decision = watch.decide(tight, watch.State(), 0.0)
    assert decision.starts == {"p0": wanted - 1}
    assert "quota" in str(decision.conflict)
    assert 0 < decision.served["s0"] < 1
    # Two services, of which one fits only a pool that is short: the other gets all of its demand.
    base = random_problem(5, pools=1, services=2, steps=1)
    pools = tuple(
        replace(base.pools[0], name=name, gpu=name, quota=quota, supply=None, held=0, refused=None)
        for name, quota in (("short", 0), ("wide", None))
    )
    services = tuple(
        replace(s, rates={gpu: 1.0}, regions=None, memory=0.0, minimum=0, maximum=None, gpus=1)
        for s, gpu in zip(base.services, ("short", "wide"), strict=True)
    )
    both = replace(
        base, pools=pools, services=services, quotas=(), policy=replace(problem.policy, region_mix={}, zone_loss=0.0)
    )
    held = watch.State(held={"wide": 500})
    decision = watch.decide(both, held, 0.0)
    assert decision.served["s1"] == 1.0
    assert decision.served["s0"] == 0.0
    assert decision.stops == {}
    assert decision.blocked["wide"] == "shortage"


def test_what_is_held_follows_the_file_where_it_changes_and_what_was_observed():
    problem = steady()
    pool = problem.pools[0]

    def with_held(n):
        return replace(problem, pools=(replace(pool, held=n),))

    state = watch.State()
    state.observe(with_held(2), None)
    assert state.held == {"p0": 2}
    state.held["p0"] = 5  # three were started
    state.observe(with_held(2), None)
    assert state.held == {"p0": 5}
    state.observe(with_held(4), None)
    assert state.held == {"p0": 4}
    state.observe(with_held(4), {"p0": 1})
    assert state.held == {"p0": 1}
    state.observe(with_held(4), {})
    assert state.held == {"p0": 0}
    with pytest.raises(CapacityError, match="p-0"):
        state.observe(with_held(4), {"p-0": 3})


def test_the_state_survives_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "deep" / "state.json"
    state = watch.State({"a": 3}, {}, {"a": 1.5}, {"a": [3, 1]}, {"a": 2})
    state.write(path)
    assert watch.State.read(path) == state
    assert path.stat().st_mode & 0o777 == 0o600
    assert watch.State.read(tmp_path / "none.json") == watch.State()
    for text in ("{", "[]", '{"held": {"a": -1}}', '{"strange": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="remove it"):
            watch.State.read(path)


@pytest.mark.parametrize(
    ("command", "code", "granted", "stopped"),
    [
        ("true", None, {"p0": 5}, {"old": 2}),
        ("""echo '{"granted": {"p0": 1}}'""", None, {"p0": 1}, {"old": 2}),
        ("exit 3", "apply-failed", {}, {}),
        ("""echo '{"granted": {"p0": 3}}'; exit 3""", "apply-failed", {"p0": 3}, {}),
        (
            """echo '{"granted": {"p0": 1}}'; echo '{"granted": {"p0": 3}, "stopped": {"old": 1}}'; exit 3""",
            "apply-failed",
            {"p0": 3},
            {"old": 1},
        ),
        ("echo nonsense", "apply-answer", {}, {}),
        ("""echo '{"granted": {"p0": 99}}'""", "apply-answer", {"p0": 5}, {"old": 2}),
        ("""echo '{"granted": {"p0": 2, "unknown": 7}}'""", "apply-answer", {"p0": 2}, {"old": 2}),
        ("""echo '{"granted": {"unknown": 7}}'""", "apply-answer", {}, {"old": 2}),
        ("""echo '{"granted": {"p0": true}}'""", "apply-answer", {}, {"old": 2}),
        ("""echo '{"granted": {"p0": -1}}'""", "apply-answer", {}, {"old": 2}),
        ("""echo '{"granted": {"p0": NaN}}'""", "apply-answer", {}, {"old": 2}),
    ],
)
def test_only_what_an_apply_command_says_it_did_counts(command, code, granted, stopped):
    done = apply({"p0": 5}, {"old": 2}, command)
    assert (done.granted, done.stopped) == (granted, stopped)
    assert (done.error and done.error.code) == code


def test_an_apply_command_gets_starts_before_stops(tmp_path):
    seen = tmp_path / "seen.json"
    apply({"p0": 1}, {"old": 2}, f"cat > {seen}")
    assert [entry["action"] for entry in json.loads(seen.read_text())["delta"]] == ["start", "stop"]


@pytest.mark.slow
def test_a_command_that_times_out_takes_its_children_along(tmp_path):
    """Each child would write its mark a second after the limit; the grants printed before it count."""
    mark = tmp_path / "mark"
    script = f"""echo '{{"granted": {{"p0": 2}}}}'; (sleep 1.5; touch {mark}) & sleep 60"""
    done = apply({"p0": 5}, {}, script, limit=0.5)
    assert done.granted == {"p0": 2}
    assert done.error.code == "apply-timeout"
    time.sleep(2)
    assert not mark.exists()


@pytest.mark.slow
def test_a_command_that_leaves_its_process_group_does_not_hold_up_the_next_round(tmp_path, monkeypatch):
    """A descendant in a session of its own keeps the pipes open; the limit holds all the same."""
    monkeypatch.setattr("capacity.actions.apply.TERM_LIMIT_S", 0.3)
    pid = tmp_path / "pid"
    script = f"""echo '{{"granted": {{"p0": 2}}}}'; setsid sh -c 'echo $$ > {pid}; exec sleep 30' & wait"""
    began = time.monotonic()
    try:
        done = apply({"p0": 5}, {}, script, limit=0.5)
        assert time.monotonic() - began < 20
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert done.granted == {"p0": 2}
    assert done.error.code == "apply-timeout"


def test_what_cannot_be_started_or_read_is_an_error_of_the_round():
    with pytest.raises(CapacityError) as caught:
        apply({"p0": 1}, {}, "true\0")
    assert caught.value.code == "no-process"
    assert apply({"p0": 1}, {}, "printf '[%.0s' $(seq 100000)").error.code == "apply-answer"


@pytest.mark.parametrize("spoil", ["rm -rf home", "echo '{' > home/state.json"])
def test_a_state_that_is_removed_or_damaged_meanwhile_asks_for_nothing_twice(tmp_path, spoil):
    problem, seen, rounds = steady(band=0.05, saving=0.0, hold_down=0.0), tmp_path / "seen", []

    def load():
        if rounds:
            subprocess.run(spoil, shell=True, check=True, cwd=tmp_path)
        rounds.append(None)
        return problem

    code = watch.loop(
        load,
        tmp_path / "home" / "state.json",
        0.01,
        threading.Event(),
        lambda _: None,
        command=f"cat >> {seen}",
        rounds=3,
    )
    assert code == 0
    assert seen.read_text().count("start") == 1
    assert watch.State.read(tmp_path / "home" / "state.json").held == {
        "p0": json.loads(seen.read_text())["delta"][0]["count"]
    }


def test_after_a_partial_failure_only_the_rest_is_asked_for():
    problem, state = steady(band=0.05, saving=0.0, hold_down=0.0), watch.State()
    first = watch.decide(problem, state, 0.0)
    asked = first.starts["p0"]
    failed = apply(first.starts, first.stops, """echo '{"granted": {"p0": 1}}'; exit 1""")
    watch.record(state, problem, first, failed)
    assert watch.decide(problem, state, 1.0).starts == {"p0": asked - 1}


@pytest.mark.parametrize(
    "answer", ["", "nonsense", '{"held": {"p0": -1}}', '{"held": {"p0": 1.5}}', '{"granted": {}}', "[]"]
)
def test_an_observe_command_must_say_what_is_held(answer):
    assert observe("""echo '{"held": {"p0": 3}}'""") == {"p0": 3}
    with pytest.raises(CapacityError) as caught:
        observe(f"echo '{answer}'")
    assert caught.value.code == "observe-answer"
    with pytest.raises(CapacityError, match="no access"):
        observe("echo no access >&2; exit 4")


def test_a_state_that_cannot_be_written_applies_nothing(tmp_path):
    """Else the same instances would be started again each round."""
    problem, mark = steady(), tmp_path / "mark"
    told = []
    code = watch.loop(
        lambda: problem,
        Path("/proc/none/state.json"),
        0.01,
        threading.Event(),
        told.append,
        command=f"touch {mark}",
        rounds=2,
    )
    assert code == 1
    assert [error.code for error in told] == ["state-not-written"] * 2
    assert not mark.exists()


def test_the_last_round_gives_the_exit_code(tmp_path):
    def run(problem, command):
        return watch.loop(
            lambda: problem, tmp_path / "state.json", 0.01, threading.Event(), lambda _: None, command=command, rounds=1
        )

    problem = steady()
    tight = replace(problem, pools=(replace(problem.pools[0], quota=1),))
    assert run(problem, None) == 0
    assert run(tight, None) == watch.SHORT_EXIT
    assert run(problem, "exit 3") == 1
