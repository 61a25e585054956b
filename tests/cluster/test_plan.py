"""The plan as a controller of a cluster, through the API's double: what it observes, what it writes, and what it leaves alone."""

import asyncio
import time

import pytest

from capacity.cluster import api as api_module
from capacity.cluster import lease as lease_module
from capacity.errors import CapacityError
from plugin.proxy.settings import Settings
from tests.kits.cluster.api import Api, failure
from tests.kits.cluster.planner import (
    IDLE,
    Process,
    idle,
    machines,
    planner,
    replicas,
    roles,
    write_plan,
)  # fmt: skip
from tests.kits.cluster.rig import Clients, activator, cluster, run, until

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.timeout(90)]


GROWING = {"pool": {"boot": "20m"}, "spread": 3.0, "max": 9}
"""Demand that can grow faster than an instance boots, so that idle ones are held."""


def pods(api, name, ready, pending=0):
    """Have so many pods of a workload."""
    for pod in [pod for pod in api.of("pods") if pod["metadata"]["labels"]["app"] == name]:
        api.remove("pods", pod["metadata"]["name"])
    for number in range(ready + pending):
        here = number < ready
        status = {"conditions": [{"type": "Ready", "status": "True"}]} if here else {}
        spec = {"nodeName": "node-0"} if here else {}
        meta = {"name": f"{name}-{number}", "labels": {"app": name}}
        api.put("pods", {"metadata": meta, "spec": {"containers": [{"name": "engine"}]} | spec, "status": status})


def with_api(test, *, workload=0, nodes=4, way="pause-pods", limit_s=30.0):
    """Run a test with an API that has one workload, its idle buffer and nodes."""

    async def inner():
        api = Api()
        await api.start()
        try:
            labels = {"app": "llama"}
            api.put(
                "deployments",
                {"metadata": {"name": "llama"}, "spec": {"replicas": workload, "selector": {"matchLabels": labels}}},
            )
            idle(api, way)
            machines(api, nodes)
            api.allowed = roles()
            await test(api)
        finally:
            await api.stop()

    run(inner(), limit_s)


def test_demand_rises_and_falls_and_the_scale_follows(tmp_path):
    """Real requests through a real proxy: it wakes the workload, the plan scales it up and down, the proxy puts it to sleep."""

    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.workload("llama")
            idle(nodes.api)
            machines(nodes.api, 8)
            plan = write_plan(tmp_path, hold_down="1s")
            async with activator(nodes, tmp_path, sleep_after_s=3.0) as proxy:
                url = f"http://127.0.0.1:{proxy.port}/-/metrics"
                words = ("--watch", "0.3s", "--demand", url, "--demand-window", "2s")
                async with Process(nodes.api, tmp_path, plan, *words) as controller:
                    await until(lambda: len(controller.lines) > 2)
                    assert replicas(nodes.api) == 0  # nobody asked: nobody wakes it
                    load = asyncio.create_task(steadily(proxy, 14, 6.0))
                    most = await until(lambda: (n := replicas(nodes.api)) >= 3 and n)
                    answers = await load
                    assert {answer.status_code for answer in answers} == {200}
                    assert most <= 6
                    await until(lambda: replicas(nodes.api) < most)
                    await until(lambda: replicas(nodes.api) == 0)
                    after = len(controller.lines)
                    await until(lambda: len(controller.lines) > after + 4)
                    assert replicas(nodes.api) == 0
                    assert await controller.end() == 0
                ups = [after for before, after in nodes.api.scalings("llama") if after > before]
                downs = [(before, after) for before, after in nodes.api.scalings("llama") if after < before]
                assert ups[0] == 1 and max(ups) >= 3
                *mine, last = downs
                assert last[1] == 0 and mine and all(2 * after >= before - 1 for before, after in mine)
                (lease,) = [
                    each for each in nodes.api.of("leases") if each["metadata"]["name"] == "quickthaw-plan-plan"
                ]
                assert not lease["spec"].get("holderIdentity")

    async def steadily(proxy, rate, seconds):
        """Send so many requests a second, each of which a pod answers in 0.2 s; return the answers."""
        sent, began = [], time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            while len(sent) < passed * rate:
                sent.append(asyncio.create_task(Clients(proxy.port).ask(f"r{len(sent)}", answer=0.2)))
            await asyncio.sleep(0.02)
        return await asyncio.gather(*sent)

    run(test(), 80.0)


@pytest.mark.parametrize("way", ["pause-pods", "capacity-buffer"])
def test_workload_and_idle_buffer_follow_the_file_and_only_what_it_names_is_touched(tmp_path, way):
    async def test(api):
        api.put(
            "deployments",
            {"metadata": {"name": "other"}, "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "other"}}}},
        )
        plural = "deployments" if way == "pause-pods" else "capacitybuffers"
        plan = write_plan(tmp_path, 10.0, **GROWING)  # an instance takes a minute: idle ones pay
        async with planner(api, tmp_path, plan, way=way) as one:
            assert await one.rounds() == 0, one.said
            up, buffer = replicas(api), replicas(api, IDLE, plural)
            assert up >= 3 and buffer >= 1
            pods(api, "llama", up)
            write_plan(tmp_path, 1.0, **GROWING | {"max": 1})
            assert await one.rounds(6) == 0, one.said
            assert replicas(api) < up and replicas(api, IDLE, plural) < buffer
        assert replicas(api, "other") == 3
        touched = {name for _, _, resource, name, _ in api.writes if resource != "leases"}
        assert touched == {"llama", IDLE}

    with_api(test, way=way)


def test_up_at_once_and_down_only_through_the_gates(tmp_path):
    async def test(api):
        plan = write_plan(tmp_path, 30.0)
        async with planner(api, tmp_path, plan) as one:
            await one.rounds()
            most = replicas(api)
            assert most >= 8
            write_plan(tmp_path, 1.0)
            await one.rounds()
            assert replicas(api) == most // 2 and one.said[-1].kept["models/llama"] == "half"
            write_plan(tmp_path, 1.0, hold_down="60s")
            await one.rounds(3)
            assert replicas(api) == most // 2 and one.said[-1].kept["models/llama"] == "hold_down"
            write_plan(tmp_path, 30.0, hold_down="60s", pool={"quota": 4})
            assert await one.rounds() == 1  # as much as the quota allows, and nothing is taken away
            assert replicas(api) == most // 2 and one.said[-1].kept.get("models/llama", "shortage") == "shortage"

    with_api(test)


def test_nothing_is_scaled_down_under_requests(tmp_path):
    """Twelve requests are being answered, two by a replica: six replicas stay."""

    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.workload("llama", replicas=7)
            idle(nodes.api)
            machines(nodes.api, 8)
            async with activator(nodes, tmp_path) as proxy:
                await until(lambda: sum(r.tracker.phase == "serving" for r in proxy.pool.replicas.values()) == 7)
                url = f"http://127.0.0.1:{proxy.port}/-/metrics"
                async with planner(
                    nodes.api, tmp_path, write_plan(tmp_path), demand=[url], window=0.5, interval=0.3
                ) as one:
                    asked = [asyncio.create_task(proxy.ask(f"r{n}", answer=5.0)) for n in range(12)]
                    await until(lambda: proxy.pool.outstanding == 12)
                    await one.rounds(6)
                    assert replicas(nodes.api) == 6, one.said
                    assert one.said[-1].kept["models/llama"] == "requests"
                    assert [(await each).status_code for each in asked] == [200] * 12
                    await one.rounds(5)
                    assert replicas(nodes.api) == 1  # the last step is the proxy's
                    assert nodes.api.scalings("llama") == [(7, 6), (6, 3), (3, 1)]

    run(test(), 40.0)


MISSING = [
    (resource, verb)
    for resource, verbs in sorted(roles().items())
    for verb in sorted(verbs)
    if resource != "statefulsets/scale"
]


@pytest.mark.parametrize(("resource", "verb"), MISSING)
def test_a_missing_verb_is_named_with_what_it_is_missing_on(tmp_path, resource, verb):
    """And nothing that the role does not name is asked for."""
    way = "capacity-buffer" if resource == "capacitybuffers" else "pause-pods"

    async def test(api):
        api.allowed = {name: verbs - ({verb} if name == resource else set()) for name, verbs in roles().items()}
        if (resource, verb) == ("leases", "update"):  # a free Lease is there already
            api.put("leases", {"metadata": {"name": "quickthaw-plan-plan"}, "spec": {"holderIdentity": ""}})
        plan = write_plan(tmp_path, 10.0, **GROWING)
        async with planner(api, tmp_path, plan, way=way) as one:
            assert await one.rounds() == 1
            errors = [str(each) for each in one.said if isinstance(each, Exception)]
            assert errors
            for error in errors:
                assert error.startswith(f"cluster-forbidden: cannot {verb} {resource} ") and "\n" not in error
                assert (
                    f"the verb {verb} on {resource} in {'a ClusterRole' if resource == 'nodes' else 'its Role'}"
                    in error
                )
            if resource not in ("deployments/scale", "capacitybuffers"):
                assert replicas(api) == 0
            if resource == "capacitybuffers" and verb == "patch":  # the rest is done all the same
                assert replicas(api) >= 3
            api.allowed = roles()
            await until_leading(one)
            assert await one.rounds() == 0, one.said
            assert replicas(api) >= 3

    with_api(test, way=way)


async def until_leading(one):
    await until(lambda: one.controller.leadership.leading)


def test_conflicts_throttling_and_errors_of_the_api_are_tried_again(tmp_path):
    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0)) as one:
            await until_leading(one)
            api.faults.conflicts, api.faults.throttled, api.faults.failing = 3, 2, 2
            assert await one.rounds() == 0, one.said
            assert replicas(api) >= 3
            assert len(api.scalings("llama")) == 1

    with_api(test)


def test_a_workload_that_others_scaled_meanwhile_is_left_for_the_next_round(tmp_path):
    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0)) as one:
            observe = one.controller.observe

            def and_somebody_scales(problem):
                seen = observe(problem)
                api.change("deployments", "llama", lambda obj: obj["spec"].update(replicas=9))
                return seen

            one.controller.observe = and_somebody_scales
            assert await one.rounds() == 1
            assert one.codes == ["changed-by-others"] and replicas(api) == 9
            one.controller.observe = observe
            pods(api, "llama", 9)
            assert await one.rounds(4) == 0
            assert 3 <= replicas(api) < 9

    with_api(test)


def test_an_outage_of_the_api_is_one_line_and_the_next_round_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(api_module, "RETRY_S", 0.3)
    monkeypatch.setattr(api_module.Api.call, "__defaults__", (0.3,))

    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0)) as one:
            await until_leading(one)
            await api.stop()
            assert await one.rounds() == 1
            assert one.codes == ["cluster-unreachable"] and "\n" not in str(one.said[0])
            await api.start()
            await until_leading(one)
            assert await one.rounds() == 0, one.said
            assert replicas(api) >= 3

    with_api(test)


def test_an_old_observation_writes_nothing(tmp_path):
    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0)) as one:
            one.controller.stale_s = 0.0
            assert await one.rounds() == 1
            assert one.codes == ["observation-stale"] and replicas(api) == 0

    with_api(test)


@pytest.mark.parametrize(
    ("url", "text"), [("http://127.0.0.1:1/-/metrics", "demand-failed"), ("ftp://x/", "demand-failed")]
)
def test_a_proxy_that_does_not_answer_stops_the_round(tmp_path, url, text):
    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0), demand=[url]) as one:
            assert await one.rounds(2) == 1
            assert set(one.codes) == {text} and replicas(api) == 0

    with_api(test)


@pytest.mark.parametrize(
    ("spoil", "code", "remedy"),
    [
        (lambda api: api.remove("deployments", "llama"), "not-found", "workload"),
        (lambda api: api.remove("deployments", IDLE), "not-found", "--emit kubernetes"),
    ],
)
def test_what_is_not_there_is_named_with_the_remedy(tmp_path, spoil, code, remedy):
    async def test(api):
        spoil(api)
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0)) as one:
            assert await one.rounds() == 1
            (error,) = one.said
            assert error.code == code and remedy in str(error)

    with_api(test)


def test_a_cluster_without_capacity_buffers_says_so(tmp_path):
    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0), way="capacity-buffer") as one:
            assert await one.rounds() == 1
            assert one.codes == ["no-capacity-buffer"] and "pause-pods" in str(one.said[0])

    with_api(test)


def test_a_pool_whose_pods_stay_without_a_node_gets_no_more_of_the_plan(tmp_path):
    async def test(api):
        idle(api, name="idle-dear-1gpu")
        dear = {"name": "dear", "instance": "dear", "price": 3, "boot": "20m"}
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0, more_pools=[dear], **GROWING)) as one:
            await one.rounds()
            assert one.said[-1].starts.keys() == {"node"}
            pods(api, IDLE, 0, pending=replicas(api, IDLE))
            await one.rounds()
            assert one.said[-1].starts.keys() == {"node"}  # they may still be booting
            one.controller.observer._pending_since["node"] -= 1.5 * 1200 + 60  # an hour later
            await one.rounds()
            assert one.said[-1].starts.keys() == {"dear"}, one.said

    with_api(test)


def cut_off():
    raise CapacityError("cluster-unreachable", "no route to host")


def test_two_controllers_do_not_fight(tmp_path, monkeypatch):
    """One plans; when it ends in order the other takes over at once, and when it is cut off once its Lease has expired."""
    monkeypatch.setattr(lease_module, "VALID_S", 1.5)
    monkeypatch.setattr(lease_module, "SURE_S", 1.0)
    monkeypatch.setattr(lease_module, "RENEW_S", 0.3)

    async def test(api):
        more, less = tmp_path / "more", tmp_path / "less"
        more.mkdir(), less.mkdir()
        async with planner(api, tmp_path, write_plan(more, 20.0), identity="a") as a:
            await until_leading(a)
            async with planner(api, tmp_path, write_plan(less, 4.0), identity="b") as b:
                await asyncio.gather(a.rounds(10), b.rounds(3))
                assert set(b.codes) == {"standing-by"} and "a holds the Lease" in str(b.said[0])
                assert len(api.scalings("llama")) == 1
                most = replicas(api)
                pods(api, "llama", most)
                a.controller.leadership._step = cut_off
                await until(lambda: b.controller.leadership.leading)
                assert not a.controller.leadership.leading
                await a.rounds()
                assert a.codes and replicas(api) == most
                await b.rounds()
                assert replicas(api) < most
                writes = len(api.scalings())
                await a.rounds(2)
                assert len(api.scalings()) == writes

    with_api(test)


def test_sigterm_in_the_middle_leaves_what_was_written_and_gives_the_lease_up(tmp_path):
    """The second write waits for an API that is short of breath; the signal ends the pause, and the next run does the rest."""

    async def test(api):
        plan = write_plan(tmp_path, 10.0, **GROWING)
        api.faults.throttled_after_scale = 1000
        async with Process(api, tmp_path, plan, "--watch", "60s") as one:
            await until(api.scalings)
            await asyncio.sleep(0.3)
            code = asyncio.create_task(one.end())
            await asyncio.sleep(0.2)
            api.faults.throttled = 0
            assert await code == 1
            assert one.lines[-1]["error"] == "apply-interrupted", one.lines
        (lease,) = api.of("leases")
        assert not lease["spec"].get("holderIdentity")
        assert len(api.scalings()) == 1
        async with planner(api, tmp_path, plan) as again:
            assert await again.rounds() == 0
        assert len(api.scalings()) == 2 and replicas(api) >= 3 and replicas(api, IDLE) >= 1

    with_api(test)


def test_a_statefulset_is_scaled_too_and_a_list_that_expires_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(api_module, "_CHUNK", 2)

    async def test(api):
        labels = {"app": "llama"}
        api.put(
            "statefulsets",
            {"metadata": {"name": "llama"}, "spec": {"replicas": 0, "selector": {"matchLabels": labels}}},
        )
        pods(api, "other", 5)
        listed, expired = api._list, []

        def once_expired(plural, namespace, selector, query):
            if query.get("continue") and not expired:
                expired.append(plural)
                return failure(410, "Expired", "the list is too old")
            return listed(plural, namespace, selector, query)

        api._list = once_expired
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0, workload="k8s://models/statefulset/llama")) as one:
            assert await one.rounds() == 0, one.said
            most = replicas(api, plural="statefulsets")
            assert expired and most >= 3 and replicas(api) == 0
            write_plan(tmp_path, 1.0, workload="k8s://models/statefulset/llama")
            await one.rounds(3)
            assert replicas(api, plural="statefulsets") == most and one.said[-1].kept["models/llama"] == "unready"
            pods(api, "llama", most)
            await one.rounds(3)
            assert replicas(api, plural="statefulsets") < most

    with_api(test)


def test_two_proxies_are_both_asked_and_with_the_admin_token(tmp_path, monkeypatch):
    """One workload behind two proxies: the requests of both count. Without the token nothing is planned."""
    monkeypatch.delenv("QUICKTHAW_ADMIN_TOKEN", raising=False)
    settings = Settings(hold_timeout_s=20.0, admin_token="letmein")

    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.workload("llama", replicas=1)
            idle(nodes.api)
            machines(nodes.api, 8)
            async with (
                activator(nodes, tmp_path, settings=settings, identity="a") as a,
                activator(nodes, tmp_path, settings=settings, identity="b") as b,
            ):
                await until(lambda: a.pool.ready() and b.pool.ready())
                urls = [f"http://localhost:{proxy.port}/-/metrics" for proxy in (a, b)]
                async with planner(nodes.api, tmp_path, write_plan(tmp_path), demand=urls, interval=0.5) as one:
                    await one.rounds()
                    assert one.codes == ["demand-failed"] and "QUICKTHAW_ADMIN_TOKEN" in str(one.said[0])
                    monkeypatch.setenv("QUICKTHAW_ADMIN_TOKEN", "letmein")
                    await one.rounds()
                    assert one.codes[-1] == "observing"
                    await asyncio.gather(*(proxy.ask(f"r{n}") for n in range(8) for proxy in (a, b)))
                    before = time.monotonic()
                    seen = await asyncio.to_thread(one.controller.observer.proxies.observe)
                    assert time.monotonic() - before < 5
                    passed = one.controller.observer.proxies._arrived
                    assert seen.rates["llama"] == pytest.approx(16 / (passed[-1][0] - passed[0][0]))

    run(test(), 40.0)


def test_an_api_that_fails_now_and_then_costs_rounds_and_nothing_else(tmp_path, monkeypatch):
    """A tenth of all calls are slow, refused, failing or cut: each error is one line with a code, and the scale is right in the end."""
    monkeypatch.setattr(api_module, "_PAUSE_S", 0.02)

    async def test(api):
        async with planner(api, tmp_path, write_plan(tmp_path, 10.0)) as one:
            await until_leading(one)
            api.faults.random_rate = 0.1
            await one.rounds(12)
            wanted = replicas(api)
            write_plan(tmp_path, 2.0)
            pods(api, "llama", wanted)
            await one.rounds(12)
            api.faults.random_rate = 0.0
            await until_leading(one)
            assert await one.rounds(3) == 0, one.said
            assert set(one.codes) <= {"cluster-unreachable", "changed-by-others", "lease-lost"}, one.codes
            assert wanted >= 3 and 1 <= replicas(api) < wanted
            ups = [move for move in api.scalings("llama") if move[1] > move[0]]
            assert len(ups) == 1, api.scalings("llama")

    with_api(test, limit_s=60.0)
