"""Demand that is learned from a trace: its bins, its rhythm, the error of its forecast."""

import time
from pathlib import Path

import numpy as np
import pytest

from capacity import requirements
from capacity.errors import InputError
from capacity.inputs import demand, document, load
from capacity.model import History

pytestmark = pytest.mark.t0

PLAN = """
step: {step}
pools: [{{name: a, gpu: H100, gpus: 1, price: 4, boot: 44s}}]
services: [{{name: s, gpus: 1, rate: {rate}, target_wait: {wait}, lead_time: {{cold: 97s, restored: 1.9s}}}}]
demand: {{trace: {{path: {path}{more}}}}}
policy: {{zone_loss: 0}}
"""


def csv(path, at, first="2026-01-05T00:00:00"):  # a Monday
    begin = np.datetime64(first)
    rows = [f"{begin + np.timedelta64(round(t * 1e6), 'us')},1,0" for t in at]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return path


def read(path, *, step="1h", rate="4/s", wait="5s", more=""):
    text = PLAN.format(path=path, step=step, rate=rate, wait=wait, more=more)
    return load.from_field(document.parse_text(text, "plan.yaml"), Path("plan.yaml"))


def rhythm(days, seed=1, weekend=1.0, busy=0.4, calm=0.05):
    """Requests: busy from 9 to 17 o'clock; on Saturday and Sunday times `weekend`."""
    random = np.random.default_rng(seed)
    hours = np.arange(days * 24)
    rate = np.where((hours % 24 >= 9) & (hours % 24 < 17), busy, calm)
    rate = rate * np.where(hours // 24 % 7 >= 5, weekend, 1.0)
    counts = random.poisson(rate * 3600)
    at = np.concatenate([h * 3600 + random.uniform(0, 3600, n) for h, n in zip(hours, counts, strict=True)])
    return np.concatenate([[0.0], np.sort(at)])


@pytest.mark.parametrize(
    ("rate", "wait", "width", "why"),
    [
        ("4/s", "5s", 5.2, "takes 250ms and may wait 5s"),  # 5.25 s, two digits
        ("0.1/s", "5s", 15.0, "takes 10s and may wait 5s"),
        ("10/s", "0s", 1.0, "at least 1s"),
        ("1/s", "10m", 46.0, "a fresh replica is there after 45.9s"),
        ("0.01/s", "10m", 100.0, "takes 100s"),
    ],
)
def test_the_bin_is_what_a_request_takes_and_may_wait_but_no_longer_than_a_start(tmp_path, rate, wait, width, why):
    problem = read(csv(tmp_path / "t.csv", np.arange(0, 4000, 0.5)), rate=rate, wait=wait)
    assert problem.demand.history.bin_seconds == width
    assert why in problem.demand.notes[0]
    given = read(csv(tmp_path / "t.csv", np.arange(0, 4000, 0.5)), rate=rate, wait=wait, more=", bin: 7s")
    assert given.demand.history.bin_seconds == 7.0
    assert "as the file says" in given.demand.notes[0]


def test_the_expected_demand_is_the_mean_whatever_the_bin(tmp_path):
    """Bursts whose median is 0: the utilization was 0.0 % for 2 requests a second."""
    at = np.concatenate([60 * k + np.linspace(0, 5, 120) for k in range(60)])
    for width in ("1s", "15s", "60s"):
        problem = read(csv(tmp_path / "t.csv", at), more=f", bin: {width}")
        assert requirements.compute(problem, "restored").typical[0, 0] == pytest.approx(2.0, rel=0.05)


def test_growth_is_counted_from_what_was_planned_for_not_from_the_noise(tmp_path):
    """A steady stream whose bins of a second are noisy: base covers the noise, so that little growth is left."""
    at = np.cumsum(np.random.default_rng(3).exponential(0.5, 20000))
    problem = read(csv(tmp_path / "t.csv", at), wait="1s")
    need = requirements.compute(problem, "restored")
    history = problem.demand.history
    noisy = requirements.growth_samples(History(history.bin_seconds, history.rates), 0, 44.9)
    planned = requirements.growth_samples(history, 0, 44.9)
    assert np.quantile(planned, 0.99) < 0.75 * np.quantile(noisy, 0.99)
    assert need.cap[0, 0] == pytest.approx(np.quantile(planned, 0.99, method="higher"))


@pytest.mark.slow
def test_the_time_of_day_is_found_and_its_error_is_said(tmp_path):
    problem = read(csv(tmp_path / "t.csv", rhythm(7)), more=", steps: 24")
    median = problem.demand.forecasts["s"].typical()
    assert median[3] < 0.1 < 0.3 < median[12]  # the trace ends at midnight
    assert problem.demand.begin == pytest.approx(np.datetime64("2026-01-12T00:00:00").astype(int), abs=60)
    assert "by time of day: in a backtest of" in problem.demand.notes[1]
    assert "of the last" in problem.demand.notes[1]


@pytest.mark.parametrize(
    ("seconds", "said", "few"),
    [
        (3, "of the whole trace, 2.4s;", True),
        (600, "of the whole trace, 10m;", False),
        (7200, "of the last 60m", False),
    ],
)
def test_a_trace_shorter_than_a_step_is_called_that(tmp_path, seconds, said, few):
    problem = read(csv(tmp_path / "t.csv", np.arange(0, seconds + 0.5, 0.5)), wait="1s")
    assert said in problem.demand.notes[1] and ("too few bins" in problem.demand.notes[1]) is few


@pytest.mark.slow
def test_the_time_of_the_week_is_found_if_there_are_weeks(tmp_path):
    problem = read(csv(tmp_path / "t.csv", rhythm(28, weekend=0.05)), more=", steps: 24, start: 2026-02-07T00:00:00")
    assert "by time of the week" in problem.demand.notes[1]  # a Saturday
    assert problem.demand.forecasts["s"].typical()[12] < 0.1
    monday = read(tmp_path / "t.csv", more=", steps: 24, start: 2026-02-09T00:00:00")
    assert monday.demand.forecasts["s"].typical()[12] > 0.3


def test_a_backtest_sees_only_the_past():
    """Whatever comes after a step, its forecast is the same."""
    rates = np.random.default_rng(5).uniform(0, 1, (1, 40 * 24 * 5))
    blocks = demand._blocks(History(90.0, rates), 3600.0, 0.0)
    for method in ("last", "day"):
        for ahead in (3, 30):
            for k in range(60, 90):
                assert all(b < k - ahead for b in blocks.like(k, k - ahead, method))
                assert blocks.like(k, k - ahead, method)
    assert blocks.like(50, 50, "day") == [26, 2]
    assert blocks.like(50, 20, "day") == [2]


def test_a_backtest_looks_half_a_plan_ahead():
    """Over a day a slow rhythm of the hours; each day has a level of its own, so that only the next hour is like the last."""
    hours = np.arange(10 * 24)
    level = np.random.default_rng(2).uniform(0, 1.0, 10)[hours // 24]
    rates = np.repeat(3 + np.sin(hours * 2 * np.pi / 24) + level, 40)[None, :]
    blocks = demand._blocks(History(90.0, rates), 3600.0, 0.0)
    found = [demand._backtest(blocks, ["last", "day"], 0.5, steps, 90.0)[0] for steps in (1, 24)]
    assert found == ["last", "day"]


def test_the_rates_of_a_service_are_averaged_over_its_own_bin(tmp_path):
    """One has a bin of 1 s; the requests of the other take 10 s and may wait 5 s."""
    rows = [f"{t},1,0,fast\n{t},1,0,slow" if t % 15 == 0 else f"{t},1,0,fast" for t in range(600)]
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens,Service\n" + "\n".join(rows) + "\n")
    one = "name: {name}, gpus: 1, rate: {rate}, target_wait: {wait}, lead_time: {{cold: 97s, restored: 1.9s}}"
    both = (one.format(name="fast", rate="10/s", wait="0s"), one.format(name="slow", rate="0.1/s", wait="5s"))
    text = PLAN.format(path=tmp_path / "t.csv", step="1h", rate="1/s", wait="1s", more="")
    text = text.replace(
        text[text.index("services: ") : text.index("demand: ")], f"services: [{{{both[0]}}}, {{{both[1]}}}]\n"
    )
    history = load.from_field(document.parse_text(text, "plan.yaml"), Path("plan.yaml")).demand.history
    assert history.bin_seconds == 1.0
    assert history.rates[0] == pytest.approx(1.0)
    assert history.rates[1, 15:] == pytest.approx(1 / 15)


def test_what_comes_next_is_like_the_last_step_not_like_the_whole_trace(tmp_path):
    problem = read(csv(tmp_path / "t.csv", np.concatenate([np.arange(0, 3600), np.arange(3600, 7200, 0.25)])))
    assert problem.demand.forecasts["s"].typical()[0] == pytest.approx(4.0, rel=0.02)


def test_a_short_trace_says_that_it_is_too_short(tmp_path):
    problem = read(csv(tmp_path / "t.csv", np.arange(0, 1000, 0.5)))
    assert "too short for a backtest" in problem.demand.notes[1]
    assert problem.demand.forecasts["s"].typical()[0] == pytest.approx(2.0, rel=0.05)


@pytest.fixture
def nine_hours_ahead(monkeypatch):
    """The zone of this process is nine hours ahead of UTC."""
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("zone", "begin"),
    [
        ("+02:00", "2026-01-05T03:00:00"),  # the trace names its zone: the start in UTC
        ("", "2026-01-05T12:00:00"),  # it does not: the start in local time, as the trace is taken to be
    ],
)
def test_a_start_is_on_the_clock_of_the_trace(tmp_path, nine_hours_ahead, zone, begin):
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"2026-01-05T00:0{m}:00{zone},1,0\n" for m in (0, 2))
    )
    found = read(path, more=", start: 2026-01-05T08:00:00+05:00").demand.begin
    assert found == np.datetime64(begin).astype(int)


def test_a_start_needs_times_of_day(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,1,0\n100,1,0\n")
    assert read(path).demand.begin is None
    with pytest.raises(InputError, match="no times of day"):
        read(path, more=", start: now")
    with pytest.raises(InputError, match="expected an ISO time or now"):
        read(csv(path, [0.0, 100.0]), more=", start: tomorrow")
