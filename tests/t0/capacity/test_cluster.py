"""What a plan reads of a cluster and of proxies, without either: addresses, selectors, counters, demand."""

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import yaml

from capacity.actions.watch import Decision
from capacity.cluster import demand, lease
from capacity.cluster.api import Scale, _final
from capacity.cluster.demand import Proxies
from capacity.cluster.moves import Move, moves
from capacity.cluster.observe import Observation, Pods, _matches, of_service, with_demand
from capacity.errors import CapacityError, InputError
from capacity.inputs.load import load
from capacity.model import Workload
from capacity.report import print_round
from tests.kits.capacity_kit import random_problem
from tests.kits.cluster.planner import write_plan

pytestmark = pytest.mark.t0


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("k8s://models/llama", Workload("models", "deployment", "llama")),
        ("k8s://models/llama:8000", Workload("models", "deployment", "llama")),
        ("k8s://models/statefulset/llama", Workload("models", "statefulset", "llama")),
        ("k8s://models/daemonset/llama", None),
        ("k8s://llama", None),
        ("http://llama", None),
        ("k8s://models/-llama", None),
    ],
)
def test_a_workload_has_the_proxys_address(tmp_path, given, found):
    path = write_plan(tmp_path, workload=given)
    if found is None:
        with pytest.raises(InputError, match="not-a-workload: .*workload: .*give k8s://"):
            load(path)
    else:
        assert load(path).services[0].workload == found


def test_two_services_have_not_the_same_workload(tmp_path):
    path = write_plan(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["services"].append(document["services"][0] | {"name": "other"})
    document["demand"]["forecast"]["other"] = document["demand"]["forecast"]["llama"]
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="repeated-name.*models/llama"):
        load(path)


@pytest.mark.parametrize(
    ("selector", "labels", "found"),
    [
        ("app=x", {"app": "x", "more": "y"}, True),
        ("app=x", {"app": "y"}, False),
        ("app==x,tier!=a", {"app": "x"}, True),
        ("app==x,tier!=a", {"app": "x", "tier": "a"}, False),
        ("tier in (a,b),!old", {"tier": "b"}, True),
        ("tier in (a, b),!old", {"tier": "b", "old": ""}, False),
        ("tier notin (a,b)", {"tier": "a"}, False),
        ("tier notin (a,b),app", {"app": ""}, True),
        ("app", {}, False),
    ],
)
def test_pods_are_those_that_the_selector_of_a_scale_names(selector, labels, found):
    assert _matches(selector, labels) is found


@pytest.mark.parametrize(("least", "behind_a_proxy", "gate"), [(0, True, "asleep"), (1, True, None), (0, False, None)])
def test_a_proxys_workload_is_left_at_zero_unless_the_plan_has_it_altogether(tmp_path, least, behind_a_proxy, gate):
    (service,) = load(write_plan(tmp_path, min=least)).services
    target = of_service(service)
    busy = {"llama": 0} if behind_a_proxy else {}
    seen = Observation(0.0, {target: Scale(0, "1", "")}, {target: Pods()}, None, busy=busy)
    found = moves({target: (2, service)}, seen, {}, 0.0, hold_down=0.0, short=False)
    assert found == (([], {"models/llama": gate}) if gate else ([Move(target, 0, 2)], {}))


@pytest.mark.parametrize(("said", "pause_s"), [("1", 1.0), ("60", 4.0), ("0", 0.2), ("-1", 0.2), ("soon", None)])
def test_a_throttled_call_is_made_again_after_the_pause_that_is_asked_for_and_never_at_once(said, pause_s):
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": said}))
    assert _final(429, "", "list", "pods", "", error) == pause_s


class Counters:
    """Proxies whose metrics are numbers: by address (finished, waiting), and a clock."""

    def __init__(self, monkeypatch):
        self.now, self.at = 0.0, {}
        monkeypatch.setattr(demand, "_addresses", lambda url: sorted(self.at))
        monkeypatch.setattr(demand, "_read", lambda url, address: self.at[address])
        monkeypatch.setattr(demand.time, "monotonic", lambda: self.now)

    def __call__(self, now, **at):
        self.now, self.at = now, {name: ({"m": done}, {"m": waiting}) for name, (done, waiting) in at.items()}


def test_rates_are_of_all_proxies_over_the_window_and_waiting_requests_are_demand(monkeypatch):
    counters, proxies = Counters(monkeypatch), Proxies(("http://proxies/",), 20.0)
    counters(0.0, a=(100, 0), b=(1000, 2))
    assert proxies.observe().rates is None
    counters(10.0, a=(150, 10), b=(1000, 42))  # 60 of a came, 40 of b
    seen = proxies.observe()
    assert seen.rates == {"m": 10.0} and seen.busy == {"m": 52}
    counters(20.0, a=(160, 0), b=(1042, 0))
    assert proxies.observe().rates == {"m": 5.0}
    counters(30.0, a=(160, 0), b=(1042, 0))
    assert proxies.observe().rates == {"m": 0.0}  # the first ten seconds have left the window


def test_a_proxy_that_was_restarted_or_is_new_does_not_count_twice(monkeypatch):
    counters, proxies = Counters(monkeypatch), Proxies(("http://proxies/",), 10.0)
    counters(0.0, a=(5000, 0))
    proxies.observe()
    counters(10.0, a=(30, 0), b=(7000, 0))  # a was restarted; b was not seen before
    assert proxies.observe().rates == {"m": 3.0}
    counters(20.0, b=(7100, 0))  # a has gone
    assert proxies.observe().rates == {"m": 10.0}


def test_a_probe_that_was_under_way_and_has_ended_is_no_restart(monkeypatch):
    counters, proxies = Counters(monkeypatch), Proxies(("http://proxies/",), 10.0)
    counters(0.0, a=(5000, 1))
    proxies.observe()
    counters(10.0, a=(5000, 0))
    assert proxies.observe().rates == {"m": 0.0}


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:1/-/metrics", "refused"),
        ("127.0.0.1:80", "http://HOST:PORT"),
        ("http://127.0.0.1:x/", "Port"),
    ],
)
def test_what_cannot_be_asked_is_one_line(url, text):
    with pytest.raises(CapacityError, match=f"^demand-failed: .*{text}.*$"):
        Proxies((url,), 10.0).observe()


@contextlib.contextmanager
def answering(part, pause_s):
    """Answer with a head, and then with a part of a body again and again; yield the port."""
    end = threading.Event()

    def serve():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            while not end.wait(pause_s):
                connection.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        end.set()
        thread.join(5.0)


@pytest.mark.parametrize(
    ("part", "text"), [(b"#", "not complete after 0.2 s"), (b"#" * (1 << 16), "longer than 0 MiB")]
)
def test_an_answer_without_an_end_is_not_awaited(monkeypatch, part, text):
    monkeypatch.setattr(demand, "ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(demand, "_MOST", 1 << 15)
    with answering(part, 0.02) as port, pytest.raises(CapacityError, match=f"^demand-failed: .*{text}$"):
        Proxies((f"http://127.0.0.1:{port}/-/metrics",), 10.0).observe()


def test_a_call_that_never_returns_does_not_keep_the_plan_from_ending(monkeypatch):
    monkeypatch.setattr(lease, "_CLOSE_S", 0.1)
    never, closed = threading.Event(), []

    class Stuck:
        def get(self, *_):
            never.wait()
            raise CapacityError("cluster-unreachable", "it has ended")

        def close(self):
            closed.append(True)

    leadership = lease.Leadership(Stuck(), "models", "quickthaw-plan-x")
    leadership.start()
    began = time.monotonic()
    leadership.close()
    assert time.monotonic() - began < 5.0 and closed
    never.set()
    leadership._thread.join(5.0)


def test_an_observed_rate_takes_the_place_of_the_first_step_only():
    problem = random_problem(3, services=2, steps=2)
    old = problem.demand.forecasts["s0"]
    seen = with_demand(problem, {"s0": 3 * old.values[0][0]}).demand.forecasts
    assert seen["s1"] == problem.demand.forecasts["s1"]
    assert [row[0] for row in seen["s0"].values] == pytest.approx([3 * row[0] for row in old.values])
    assert [row[1] for row in seen["s0"].values] == [row[1] for row in old.values]


def test_an_observed_rate_where_nothing_was_expected_is_each_quantile(tmp_path):
    problem = load(write_plan(tmp_path, 0.0))
    assert with_demand(problem, {"llama": 2.5}).demand.forecasts["llama"].values == ((2.5,), (2.5,))


@pytest.mark.parametrize("moved", [None, ()])
def test_a_round_in_a_cluster_shows_no_instances_that_its_autoscaler_starts(capsys, moved):
    plan = SimpleNamespace(hourly_cost=[1.0], buffer_by_type=dict)
    print_round(Decision(plan, {"h100": 1}, {}, {}, moved=moved), as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said.get("start") == ({"h100": 1} if moved is None else None) and ("scaled" in said) is (moved is not None)
