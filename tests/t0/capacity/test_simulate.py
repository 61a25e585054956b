"""The simulation: requests wait as they should, policies see only the past, the same seed gives the same run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from capacity import report
from capacity.errors import InputError
from capacity.inputs import synthetic
from capacity.inputs.load import load
from capacity.inputs.trace import Trace, read
from capacity.inputs.units import duration_text
from capacity.model import Demand, Forecast, Policy, Pool, Problem, Service
from capacity.simulation import simulate
from capacity.simulation.fleet import Fleet, Replica
from capacity.simulation.policies import Autoscaler, Buffered, Hpa, Past, Program

pytestmark = pytest.mark.t0

REPO = Path(__file__).resolve().parents[3]
TRACE = REPO.parent / "shared" / "data" / "azure_llm_2023_code.csv"


def problem(**changes):
    pool = Pool(
        "a",
        "1xH100",
        "H100",
        1,
        80.0,
        "r",
        "z",
        3.0,
        quota=50,
        boot=(40.0,),
        interruptions=changes.pop("interruptions", 0.0),
    )
    service = Service(
        "s", 1, {"*": 1.0}, cold=(100.0,), restored=(2.0,), target_wait=10.0, probability=0.9, unit="tokens", **changes
    )
    demand = Demand(0.9, {"s": Forecast((0.5, 0.9), ((1.0,), (2.0,)))})
    return Problem((pool,), (service,), demand, Policy(zone_loss=0.0))


def requests(at, work=None):
    at = np.asarray(at, dtype=np.float64)
    work = np.ones(len(at)) if work is None else np.asarray(work, dtype=np.float64)
    return Trace(at, work, np.zeros(len(at)), np.zeros(len(at), dtype=np.int64), ("s",))


@pytest.mark.parametrize("work", [0.0, 1.0, 1e9])
def test_a_trace_of_one_request(work):
    """Served at once by the replica that runs from the beginning; work beyond the end of the run is not counted."""
    for policy in policies():
        result = simulate.run(problem(minimum=1), requests([0.0], [work]), policy, simulate.Options())
        assert (result.requests, result.waited, result.late, result.unserved) == (1, 0, 0, 0)
        assert 0 <= result.utilization <= 1


def test_a_trace_without_names_of_several_services_is_refused():
    several = load(REPO / "examples" / "plan.yaml")
    with pytest.raises(InputError, match="no Service column, and there are 3 services"):
        Trace(np.zeros(1), np.ones(1), np.ones(1), np.zeros(1, dtype=np.int64), ("",)).arrivals(several.services)


class Still(Autoscaler):
    """Leaves the fleet as it began."""

    name = "still"

    def tick(self, fleet, past):
        self.fleet = fleet


def test_one_replica_is_a_queue_in_order():
    """Lindley's recursion: wait = max(0, wait before + work before - time between)."""
    random = np.random.default_rng(2)
    at = np.cumsum(random.exponential(1.1, 400))
    trace = requests(at - at[0])
    result = simulate.run(problem(minimum=1), trace, Still(), simulate.Options())
    wait, expected = 0.0, []
    for i in range(len(at)):
        if i:
            wait = max(0.0, wait + 1.0 - (at[i] - at[i - 1]))
        expected.append(wait)
    assert result.waits == pytest.approx(np.array(expected), abs=1e-9)
    assert result.unserved == 0
    assert 0 < result.late == int((np.array(expected) > 10.1).sum()) < result.waited  # the target wait is 10 s


def test_slots_share_a_replica():
    """Four slots at rate 1: four requests at once take four seconds each, the fifth waits for the first of them."""
    result = simulate.run(problem(minimum=1, concurrency=4), requests([0, 0, 0, 0, 0]), Still(), simulate.Options())
    assert result.waits.tolist() == [0, 0, 0, 0, 4]


def fleet(trace, **options):
    made = problem(**{k: options.pop(k) for k in list(options) if k == "interruptions_rate"})
    settings = {"seed": 1, "refusals": 0.0, "interruptions": 0.0, **options}
    return Fleet(made, trace.arrivals(made.services), "restored", **settings)


def test_a_replica_on_a_booting_instance_is_ready_after_boot_and_lead():
    one = fleet(requests([0.0]))
    assert one.start_instances(0, 1) == 1
    assert one.start_replica(0)
    one.advance(60.0)
    assert one.queues[0].waits.tolist() == [42.0]
    one.finish()
    assert one.paid_gpu_seconds == 60.0
    assert one.cost == pytest.approx(60 / 3600 * 3)


def test_a_replica_that_is_stopped_finishes_and_no_more():
    one = fleet(requests([0.0, 0.5, 5.0], [4.0, 1.0, 1.0]))
    one.start_instances(0, 1, booted=True)
    one.start_replica(0, warm=True)
    one.advance(1.0)
    assert one.stop_replica(0)
    assert one.stop_empty(0, 1) == 0
    one.advance(3.0)
    assert one.instances[0][0].free == 0
    one.advance(5.0)
    assert one.instances[0][0].free == 1
    assert one.stop_empty(0, 1) == 1
    assert one.queues[0].waits[0] == 0
    assert np.isinf(one.queues[0].waits[1:]).all()


@pytest.mark.parametrize("stopped", [False, True])
def test_an_interrupted_instance_sends_its_requests_back_to_the_head(stopped):
    one = fleet(requests([0.0, 0.1], [10.0, 1.0]))
    one.start_instances(0, 1, booted=True)
    one.start_replica(0, warm=True)
    one.advance(1.0)
    if stopped:
        one.stop_replica(0)
    one._kill(next(iter(one.instances[0][0].replicas)))
    one._end(one.instances[0][0])
    assert one.queues[0].busy_gpu_seconds == pytest.approx(1.0)
    assert one.waiting(0) == (2, 11.0)
    one.start_instances(0, 1, booted=True)
    one.start_replica(0, warm=True)
    one.advance(20.0)
    assert one.queues[0].waits.tolist() == [1.0, 10.9]


@pytest.mark.slow
def test_refusals_and_interruptions_happen_by_rate_and_every_request_is_served():
    made = problem(interruptions=20.0)
    trace = requests(np.arange(0, 1800, 0.7))
    for policy in (Hpa(kind="restored"), Program(), Buffered(kind="restored", buffer=1)):
        result = simulate.run(made, trace, policy, simulate.Options(seed=3, refusals=0.3))
        assert result.unserved == 0
        assert result.actions > 10
        calm = simulate.run(made, trace, type(policy)(kind="restored"), simulate.Options(seed=3, interruptions=0.0))
        assert result.longest > calm.longest * 0.99


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run():
    trace = synthetic.generate(synthetic.Day(("s",), 250, 0.06, seed=4))
    made = problem(interruptions=2.0)
    one, two, other = (
        simulate.run(made, trace, Program(), simulate.Options(seed=seed, refusals=0.2)) for seed in (1, 1, 2)
    )
    assert (one.waits == two.waits).all()
    assert (one.gpu_hours, one.actions, one.series) == (two.gpu_hours, two.actions, two.series)
    assert one.gpu_hours != other.gpu_hours


def policies():
    return [Buffered(), Buffered(buffer=1), Hpa(), Program(kind="cold"), Program()]


@pytest.mark.parametrize("index", range(5))
def test_policies_see_only_the_past(index):
    """Whatever happens after minute 5, all that was decided up to then is the same."""
    random = np.random.default_rng(8)
    first = np.sort(random.uniform(0, 300, 500))
    quiet, busy = np.sort(random.uniform(300, 600, 20)), np.sort(random.uniform(300, 600, 2500))
    runs = [
        simulate.run(problem(), requests(np.concatenate([first, rest])), policies()[index], simulate.Options())
        for rest in (quiet, busy)
    ]
    seen = [
        [(t, r, h) for t, r, h in zip(s.at, s.replicas, s.held, strict=True) if t <= 300]
        for s in (r.series for r in runs)
    ]
    assert seen[0] == seen[1]
    assert runs[0].series.held != runs[1].series.held


def test_past_shows_only_bins_that_have_ended():
    past = Past(np.arange(10.0)[None, :])
    assert past.until(0.0)[0].shape == (1, 0)
    assert past.until(14.9)[0].shape == (1, 0)
    assert past.until(15.0)[0].tolist() == [[0.0]]
    rates, levels = past.until(75.0)
    assert rates.tolist() == [[0, 1, 2, 3, 4]]
    assert levels.tolist() == [[0, 0.5, 1, 1.5, 2.5]]


@pytest.mark.parametrize(
    ("current", "ready", "load", "wish"),
    [
        (2, 2, 2.8, 4),  # 200 % of 0.7: doubles
        (2, 2, 1.5, 2),  # 107 %: inside the tolerance of 10 %
        (2, 2, 1.53, 2),  # 109 %: still inside
        (2, 2, 1.6, 3),
        (10, 10, 3.5, 5),  # half of the target: halves
        (1, 1, 70.0, 5),  # at most 4 more in a step when that is the larger
        (10, 10, 140.0, 20),  # at most 100 % more
        (4, 2, 2.8, 4),  # two not ready count as zero: 2.8 / 4 / 0.7 = 1, so nothing is done
        (4, 2, 4.2, 6),  # 1.5 * 4
    ],
)
def test_the_documented_rules_of_the_autoscaler(current, ready, load, wish):
    assert Hpa()._desired_replicas(current, ready, load) == wish


def test_the_autoscaler_scales_down_to_the_largest_wish_of_five_minutes():
    busy = np.arange(0, 600, 0.25)
    trace = requests(np.concatenate([busy, [1500.0]]))
    result = simulate.run(problem(), trace, Hpa(kind="restored"), simulate.Options())
    at, replicas = np.array(result.series.at), np.array(result.series.replicas)
    top = replicas.max()
    assert top >= 5
    assert (replicas[(at > 600) & (at < 900)] == top).all()
    assert replicas[at > 1000].max() <= 1


def test_synthetic_days_are_what_was_asked_for(tmp_path):
    day = synthetic.Day(("a", "b"), 20_000, 24.0, seed=3)
    one, two = synthetic.generate(day), synthetic.generate(day)
    assert (one.at == two.at).all()
    assert len(one.at) == pytest.approx(20_000, rel=0.05)
    assert (np.diff(one.at) >= 0).all()
    rates = synthetic.rates(day)
    assert rates.sum() == pytest.approx(20_000)
    assert (rates >= 0).all()
    synthetic.write(one, tmp_path / "day.csv")
    back = read(tmp_path / "day.csv")
    assert np.abs(back.at - one.at).max() < 2e-6
    assert (back.context == one.context).all()
    names = [one.services[k] for k in one.service]
    assert [back.services[k] for k in back.service] == names
    assert list(tmp_path.iterdir()) == [tmp_path / "day.csv"]


@pytest.mark.slow  # three seconds of drawing
def test_the_plot_is_written_twice_and_the_same(tmp_path):
    from capacity import plot

    trace = synthetic.generate(synthetic.Day(("s",), 800, 0.5, seed=4))
    results = [simulate.run(problem(), trace, policy, simulate.Options()) for policy in policies()[3:]]

    def write(name):
        return plot.write(
            tmp_path / name,
            "a <day>",
            lambda page: page.print("the tables"),
            plot.frontier([replace(r, policy="plan, x") for r in results], ["plan"]),
            plot.over_time(results, "a day"),
        )

    png, svg, html = write("one")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg.read_bytes() == write("two")[1].read_bytes()
    page = html.read_text()
    assert page.count("<svg") == 2
    assert "the tables" in page
    assert "a &lt;day&gt;" in page
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.slow  # a second of drawing
def test_waits_below_a_second_are_drawn_on_an_axis_that_one_reads():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from capacity import plot

    result = simulate.run(problem(), requests([0.0], [1.0]), policies()[0], simulate.Options())
    points = [replace(result, policy="plan, x", p50=0.02, p99=0.05)]
    figure = Figure()
    plot.frontier(points, ["plan"])(figure)
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason="the Azure code trace is not beside the repository")
def test_the_real_trace():
    """At the reactive autoscaler's p99 wait, the program with restored lead times uses fewer GPU hours than it and than the
    program with cold ones (for the settings that benchmarks/capacity.py finds; the run is deterministic)."""
    made, trace = load(REPO / "examples" / "plan_trace.yaml"), read(TRACE)
    assert len(trace.at) == 8819
    held = replace(made, policy=replace(made.policy, hysteresis=replace(made.policy.hysteresis, hold_down=30.0)))
    options = simulate.Options()
    hpa = simulate.run(made, trace, Hpa(), options)
    restored = simulate.run(held, trace, Program(target_wait=79.0, probability=0.5), options)
    cold = simulate.run(held, trace, Program(kind="cold", target_wait=79.0, probability=0.5), options)
    assert restored.p99 <= hpa.p99
    assert restored.gpu_hours < hpa.gpu_hours
    assert restored.gpu_hours < cold.gpu_hours
    assert restored.unserved == 0


def with_standby(memory=10.0, host=25.0, **changes):
    made = problem(**changes)
    service = replace(made.services[0], standby=(0.5,), standby_memory=memory)
    return replace(made, services=(service,), pools=(replace(made.pools[0], host_memory=host),))


def resting_fleet(trace, made, ladder=True):
    one = Fleet(made, trace.arrivals(made.services), "restored", seed=1, refusals=0.0, interruptions=0.0, ladder=ladder)
    one.start_instances(0, 1, booted=True)
    one.start_replica(0, warm=True)
    one.advance(1.0)
    one.stop_replica(0)
    one.advance(2.0)
    return one


@pytest.mark.parametrize(
    ("ladder", "host", "rung", "wait"),
    [(True, 25.0, "standby", 0.5), (True, 9.0, "restored", 2.0), (False, 25.0, "restored", 2.0)],
)
def test_a_replica_in_standby_frees_its_gpu_and_wakes_in_its_own_time(ladder, host, rung, wait):
    one = resting_fleet(requests([0.0, 11.0]), with_standby(host=host), ladder)
    assert one.instances[0][0].free == 1
    one.advance(11.0)
    one.start_replica(0)
    one.advance(20.0)
    assert one.starts[rung] == 1
    assert one.queues[0].waits.tolist() == [0.0, wait]
    assert one.standby_gib_seconds == pytest.approx(10.0 * 9.0 if rung == "standby" else 0.0)


def test_what_is_in_standby_at_the_end_counts():
    one = resting_fleet(requests([0.0]), with_standby())
    one.advance(12.0)
    one.finish()
    assert one.standby_gib_seconds == pytest.approx(10.0 * (12.0 - 2.0))


def test_a_start_takes_the_instance_on_which_its_service_is_in_standby():
    one = resting_fleet(requests([0.0]), with_standby())
    one.start_instances(0, 1, booted=True)
    first, second = one.instances[0]
    second.resting, first.resting = first.resting, []
    one.start_replica(0)
    assert one.starts["standby"] == 1
    assert len(second.replicas) == 1


def test_the_oldest_standby_makes_room_and_an_instance_that_goes_takes_its_own_along():
    made = with_standby()
    one = resting_fleet(requests([0.0]), made)
    host = one.instances[0][0]
    for _ in range(3):
        replica = Replica(0, [host], 0.0, 1.0, [-1])
        one._rest(replica)
        one.advance(one.now + 1.0)
    assert [since for _, since in host.resting] == [3.0, 4.0]
    one.start_instances(0, 1, booted=True)
    younger = one.instances[0][1]
    younger.resting, host.resting = host.resting, []
    one.stop_empty(0, 1)
    assert one.instances[0] == [younger]  # the one without standby went first
    one.stop_empty(0, 1)
    assert younger.resting == []
    assert one.standby_gib_seconds == pytest.approx(10.0 * (1 + 2 + 2 + 1))


def test_the_ladder_waits_no_longer_and_costs_what_its_memory_costs():
    burst = np.arange(0, 60, 0.2)
    trace = requests(np.concatenate([burst, burst + 300, burst + 600]))
    made = with_standby()
    made = replace(made, policy=replace(made.policy, hysteresis=replace(made.policy.hysteresis, hold_down=30.0)))
    assert [p.name for p in simulate.default_policies(made)][-1] == "lp ladder"
    free, dear = (
        simulate.run(made, trace, Program(ladder=True), simulate.Options(memory_price=price)) for price in (0.0, 2.0)
    )
    plain = simulate.run(made, trace, Program(), simulate.Options())
    assert free.starts["standby"] > 0 == plain.starts["standby"]
    assert free.waits.sum() < plain.waits.sum() and free.p99 <= plain.p99
    assert dear.cost == pytest.approx(free.cost + 2.0 * free.standby_gib_hours)


@pytest.mark.slow
def test_wait_against_cost_for_the_three(monkeypatch):
    monkeypatch.setattr(simulate, "HOLDS", (30.0,))
    monkeypatch.setattr(simulate, "WAITS", (1.0,))
    monkeypatch.setattr(simulate, "TARGETS", (0.3, 0.7))
    trace = synthetic.generate(synthetic.Day(("s",), 60, 0.02, seed=4))
    found = simulate.frontier(problem(), trace, simulate.Options())
    bests = []
    for name in simulate.FRONTIER:
        mine = simulate.settings_of(found, name)
        assert mine
        best = simulate.pareto(mine, "p99")
        assert all(a.cost < b.cost and a.p99 > b.p99 for a, b in zip(best, best[1:], strict=False))
        assert all(any(b.cost <= r.cost and b.p99 <= r.p99 for b in best) for r in mine)
        bests += best
    assert simulate.pareto_of_each(found) == bests
    bar = next(r for r in found if r.policy == "autoscaler cold, target 70%")
    said = report.frontier_sentence(found)
    assert said.startswith(f"autoscaler cold, target 70%: p99 wait {duration_text(bar.p99)} for ${bar.cost:,.2f}.")
    for name in simulate.FRONTIER[1:]:
        cheapest = min(r.cost for r in simulate.settings_of(found, name) if r.p99 <= bar.p99)
        assert f"{name} for ${cheapest:,.2f}" in said
    waits = [replace(r, p99=bar.p99 + 1) if r.policy.startswith("plan") else r for r in found]
    assert report.frontier_sentence(waits).endswith("plan at no setting.")
