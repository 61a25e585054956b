"""Requests to a workload at zero, through the API's double, with pods that are processes."""

import asyncio
import contextlib
import json
import time

import httpx2
import kubernetes_validate
import pytest
import yaml

from plugin.proxy.endpoints.models_file import load
from plugin.proxy.settings import Settings
from tests.kits.cluster.rig import PLAIN, activator, cluster, executed, run, until
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.timeout(90)]


def role():
    """Return the verbs by resource that the example's role gives."""
    documents = yaml.safe_load_all((REPO / "examples" / "kubernetes_proxy.yaml").read_text())
    rules = next(each["rules"] for each in documents if each["kind"] == "Role")
    return {resource: rule["verbs"] for rule in rules for resource in rule["resources"]}


@contextlib.asynccontextmanager
async def at_zero(folder, *, without=None, **spec):
    """Run a cluster with one workload at zero and a proxy in front of it. `without`: the resource that its role lacks."""
    async with cluster(folder) as nodes:
        nodes.workload("llama")
        if without:
            nodes.api.allowed = {name: verbs for name, verbs in role().items() if name != without}
        async with activator(nodes, folder, **spec) as proxy:
            yield nodes, proxy


@contextlib.asynccontextmanager
async def two_proxies(folder, *, a_sleeps_after_s, b_sleeps_after_s=None):
    """Run a cluster with one workload at zero and the proxies `a` and `b` in front of it, each with its Lease."""
    async with (
        at_zero(folder, identity="a", sleep_after_s=a_sleeps_after_s) as (nodes, a),
        activator(nodes, folder, identity="b", sleep_after_s=b_sleeps_after_s) as b,
    ):
        await until(lambda: len(nodes.api.of("leases")) == 2)
        yield nodes, a, b


@pytest.mark.parametrize("kind", ["deployment", "statefulset"])
def test_held_requests_wake_the_workload_once_and_the_idle_one_goes_back_to_zero(tmp_path, kind):
    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.workload("llama", plural=f"{kind}s")
            nodes.api.allowed = role()
            async with activator(nodes, tmp_path, kind=kind, sleep_after_s=0.5) as proxy:
                for woken in (1, 2):
                    answers = await asyncio.gather(*(proxy.ask(f"r{woken}{n}") for n in range(6)))
                    assert [answer.status_code for answer in answers] == [200] * 6
                    assert {answer.json()["name"] for answer in answers} == {f"llama-{woken}"}
                    await until(lambda: not nodes.api.of("pods"))
                    assert nodes.api.scalings() == [(0, 1), (1, 0)] * woken
                ids = sorted(name for name, _ in executed(tmp_path))
                assert ids == sorted(f"r{woken}{n}" for woken in (1, 2) for n in range(6))

    run(test())


def test_the_pod_is_asked_itself_so_a_slow_readiness_probe_costs_nothing(tmp_path):
    async def test():
        async with cluster(tmp_path, probe_s=30.0) as nodes:
            nodes.workload("llama", service=False)
            async with activator(nodes, tmp_path) as proxy:
                assert (await proxy.ask("r")).status_code == 200
                (pod,) = nodes.api.of("pods")
                ready = [each["status"] for each in pod["status"]["conditions"] if each["type"] == "Ready"]
                assert ready == ["False"]

    run(test())


def test_a_pod_without_a_node_gives_the_reason_and_serves_once_it_has_one(tmp_path):
    async def test():
        async with cluster(tmp_path, slots=0) as nodes:
            nodes.workload("llama")
            async with activator(nodes, tmp_path, schedule_grace_s=0.3) as proxy:
                answer = await proxy.ask("r1")
                error = answer.json()["error"]
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
                assert error["code"] == "pod-unschedulable" and "Insufficient nvidia.com/gpu" in error["message"]
                nodes.slots = 1
                await until(lambda: proxy.pool.ready())
                assert (await proxy.ask("r2")).status_code == 200
                assert nodes.api.scalings() == [(0, 1)] and [name for name, _ in executed(tmp_path)] == ["r2"]

    run(test())


@pytest.mark.slow
def test_without_a_schedule_timeout_the_api_is_asked_ever_less_often(tmp_path):
    async def test():
        async with at_zero(tmp_path, without="deployments", schedule_grace_s=0.0) as (nodes, proxy):
            nodes.api.allowed = {name: verbs for name, verbs in role().items() if name != "deployments"}
            nodes.quota = "exceeded quota"
            waiting = asyncio.create_task(proxy.ask("r1"))
            await asyncio.sleep(3.2)
            assert not waiting.done() and nodes.api.calls["get", "deployments/scale"] <= 4
            nodes.quota = ""
            nodes.api.notify()
            assert (await waiting).status_code == 200

    run(test())


@pytest.mark.parametrize("allowed", [True, False])
def test_where_no_pod_is_made_at_all_the_held_request_gets_the_reason(tmp_path, allowed):
    """Without the verb that reads it the request waits for its deadline, and serves if a pod comes."""

    async def test():
        async with at_zero(tmp_path, without=None if allowed else "deployments", schedule_grace_s=0.3) as (
            nodes,
            proxy,
        ):
            nodes.api.allowed = {name: verbs for name, verbs in role().items() if allowed or name != "deployments"}
            nodes.quota = 'pods "llama-1" is forbidden: exceeded quota: gpus, requested: 1, used: 8, limited: 8'
            if allowed:
                answer = await proxy.ask("r1")
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
                error = answer.json()["error"]
                assert (error["code"], "exceeded" in error["message"]) == ("pod-refused", False), error
                assert "FailedCreate" in error["message"]
                (pool,) = (await proxy.status())["pools"]
                assert "exceeded quota: gpus" in pool["last_failure"]["message"]
            waiting = asyncio.create_task(proxy.ask("r2"))
            await asyncio.sleep(0.0 if allowed else 1.0)
            assert not waiting.done()
            nodes.quota = ""
            nodes.api.notify()
            first = await waiting
            if first.status_code == 503:  # it came before the pod
                await until(lambda: proxy.pool.ready())
                first = await proxy.ask("r3")
            assert first.status_code == 200

    run(test())


def test_the_start_is_followed_in_the_status_and_in_comments_of_a_stream(tmp_path):
    async def test():
        settings = Settings(hold_timeout_s=20.0, early_stream=True, early_comment_every_s=0.02)
        async with cluster(tmp_path, pull_s=0.3, options={"llama": ["--start", "0.3"]}) as nodes:
            nodes.workload("llama")
            async with activator(nodes, tmp_path, settings=settings) as proxy:
                seen, steps = [], set()
                url = f"http://127.0.0.1:{proxy.port}"
                async with httpx2.AsyncClient(trust_env=False, verify=PLAIN, timeout=20) as client:
                    body = {"model": "m", "prompt": "a", "stream": True}
                    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                        async for line in answer.aiter_lines():
                            seen.append(line)
                            if line.startswith(": waking"):
                                document = (await client.get(f"{url}/-/status")).json()
                                steps.add(document["pools"][0]["progress"]["step"])
                text = "\n".join(seen)
                assert ": waking, pulling or creating; " in text and ": waking, running; " in text, text
                assert {"pulling or creating", "running"} <= steps
                assert 'data: {"name": "llama-1"' in text, text

    run(test())


def test_a_pod_that_is_killed_or_deleted_loses_only_what_it_was_answering(tmp_path):
    async def test():
        async with cluster(tmp_path) as nodes:
            nodes.workload("llama", replicas=2)
            async with activator(nodes, tmp_path) as proxy:
                await until(lambda: len(nodes.started) == 2 and len(proxy.pool.replicas) == 2)
                await until(lambda: all(r.tracker.phase == "serving" for r in proxy.pool.replicas.values()))
                slow = [asyncio.create_task(proxy.ask(f"slow{n}", answer=1.0)) for n in range(4)]
                await until(lambda: len(executed(tmp_path)) == 4)
                first, second = nodes.started
                by_pod = dict(executed(tmp_path))
                assert sorted(by_pod.values()) == sorted([first, first, second, second])  # least outstanding
                nodes.runtime.kill(first)
                answers = [await proxy.ask(f"after{n}") for n in range(10)]
                assert {answer.status_code for answer in answers} == {200}
                for task in slow:
                    answer = await task
                    name = answer.headers.get("x-request-id")
                    assert name in by_pod
                    assert answer.status_code == (502 if by_pod[name] == first else 200)
                # deleted in order: what it has in flight ends, nothing new comes
                slow = [asyncio.create_task(proxy.ask(f"late{n}", answer=0.7)) for n in range(4)]
                await until(lambda: len(executed(tmp_path)) == 18)
                nodes.delete(second)
                await until(lambda: second not in {m.pod.name for m in proxy.workload._members.values()})
                answers = [await proxy.ask(f"new{n}") for n in range(6)]
                assert second not in {answer.json()["name"] for answer in answers}
                assert [(await task).status_code for task in slow] == [200] * 4
                names = [name for name, _ in executed(tmp_path)]
                assert len(names) == len(set(names)) == 24

    run(test())


def test_while_the_api_is_away_requests_go_on_to_known_pods_and_afterwards_all_is_seen_again(tmp_path):
    async def test():
        async with at_zero(tmp_path) as (nodes, proxy):
            assert (await proxy.ask("r0")).status_code == 200
            await nodes.api.stop()
            for n in range(20):
                assert (await proxy.ask(f"away{n}")).status_code == 200
            nodes.delete("llama-1")  # unseen
            await until(lambda: "llama-2" in nodes.started)
            nodes.api.compact()
            await nodes.api.start()
            await until(lambda: {m.pod.name for m in proxy.workload._members.values()} == {"llama-2"})
            assert (await proxy.ask("r1")).json()["name"] == "llama-2"

    run(test())


def test_a_request_at_zero_is_held_while_the_api_is_away_and_answered_afterwards(tmp_path):
    async def test():
        async with at_zero(tmp_path) as (nodes, proxy):
            await until(lambda: proxy.workload._pods is not None)
            await nodes.api.stop()
            held = asyncio.create_task(proxy.ask("r"))
            await until(lambda: "API" in proxy.pool.progress().sentence())
            await nodes.api.start()
            assert (await held).status_code == 200
            assert nodes.api.scalings() == [(0, 1)]

    run(test())


def test_two_proxies_make_one_wake_and_none_scales_down_under_the_others_requests(tmp_path):
    async def test():
        async with two_proxies(tmp_path, a_sleeps_after_s=0.4, b_sleeps_after_s=0.4) as (nodes, a, b):
            answers = await asyncio.gather(*((a, b)[n % 2].ask(f"r{n}") for n in range(8)))
            assert [answer.status_code for answer in answers] == [200] * 8
            assert nodes.api.scalings() == [(0, 1)]
            # b answers for long; a is idle all the while, and asks
            assert (await b.ask("long", answer=2.0)).status_code == 200
            assert nodes.api.scalings() == [(0, 1)]
            asked = [what for _, verb, kind, name, what in nodes.api.writes if kind == "leases" and name.endswith("-a")]
            assert any('"wants": {"deployment/llama"' in json.dumps(what).replace("\\", "") for what in asked)
            await until(lambda: nodes.api.scalings() == [(0, 1), (1, 0)])
            # and again, by the other
            assert (await b.ask("again")).status_code == 200
            assert nodes.api.scalings()[:3] == [(0, 1), (1, 0), (0, 1)]

    run(test())


def test_a_request_that_comes_while_another_proxy_scales_down_is_held_and_wakes_anew(tmp_path):
    async def test():
        async with two_proxies(tmp_path, a_sleeps_after_s=0.3) as (nodes, a, b):
            assert (await a.ask("r0")).status_code == 200
            done = []
            for n in range(60):  # every 25 ms, through the whole of the move down
                done.append(asyncio.create_task(b.ask(f"b{n}")))
                if nodes.api.scalings()[1:]:
                    break
                await done[-1]
                await asyncio.sleep(0.36 if n % 4 == 0 else 0.025)
            assert nodes.api.scalings()[1:], "it was never scaled down"
            answers = [await task for task in done]
            assert {answer.status_code for answer in answers} == {200}
            names = [name for name, _ in executed(tmp_path)]
            assert len(names) == len(set(names)) == len(done) + 1

    run(test())


def test_a_pod_that_comes_while_others_go_is_not_waited_for_and_serves(tmp_path):
    async def test():
        async with at_zero(tmp_path) as (nodes, proxy):
            assert (await proxy.ask("r0")).status_code == 200
            going = asyncio.create_task(proxy.workload._until_gone())
            nodes.delete("llama-1")
            async with asyncio.timeout(4):
                await going
            assert (await proxy.ask("r1")).json()["name"] == "llama-2"
            await asyncio.sleep(0.3)
            assert [r.tracker.phase for r in proxy.pool.replicas.values()] == ["serving"]

    run(test())


def test_an_outage_is_logged_once_for_all_copies(tmp_path, caplog):
    async def test():
        async with at_zero(tmp_path) as (nodes, proxy):
            assert (await proxy.ask("r0")).status_code == 200
            await nodes.api.stop()
            await until(lambda: "stays in use" in caplog.text)
            await asyncio.sleep(3.0)
            await nodes.api.start()

    run(test())
    assert caplog.text.count("stays in use") == 1


def test_a_proxy_that_was_killed_delays_a_scale_down_until_its_lease_has_expired(tmp_path, monkeypatch):
    async def test():
        monkeypatch.setattr("plugin.proxy.kubernetes.agreement.VALID_S", 1.5)
        monkeypatch.setattr("plugin.proxy.kubernetes.agreement.RENEW_S", 0.3)
        monkeypatch.setattr("plugin.proxy.kubernetes.agreement.ASK_S", 0.5)
        async with two_proxies(tmp_path, a_sleeps_after_s=0.3) as (nodes, a, b):
            assert (await b.ask("r0")).status_code == 200
            b.session.agreement._background.cancel()  # as if it had been killed: its Lease stays as it is
            b.session.agreement._circles.clear()
            killed = time.monotonic()
            assert (await a.ask("r1")).status_code == 200
            await until(lambda: nodes.api.scalings() == [(0, 1), (1, 0)])
            assert time.monotonic() - killed > 1.0

    run(test())


@pytest.mark.parametrize("gone_as_status", [False, True])
def test_conflicts_throttling_errors_and_versions_that_are_gone_cost_no_request(tmp_path, gone_as_status):
    async def test():
        async with at_zero(tmp_path) as (nodes, proxy):
            api = nodes.api
            await until(lambda: proxy.workload._pods is not None and proxy.workload._pods.listed.is_set())
            api.faults.gone_as_status = gone_as_status
            for n in range(5):
                api.put(
                    "pods",
                    {"metadata": {"name": f"other{n}", "labels": {"app": "other"}}, "spec": {}, "status": {}},
                )
            api.compact()
            api.drop_watches()
            api.faults.conflicts, api.faults.throttled, api.faults.failing = 2, 2, 1
            assert (await proxy.ask("r")).status_code == 200
            assert api.scalings() == [(0, 1)]

    run(test())


@pytest.mark.parametrize("missing", ["endpointslices", "leases"])
def test_without_endpoints_it_serves_by_the_pods_and_without_leases_it_scales_nothing_down(tmp_path, missing):
    async def test():
        async with at_zero(tmp_path, without=missing, sleep_after_s=0.3) as (nodes, proxy):
            assert (await proxy.ask("r")).status_code == 200
            with contextlib.suppress(TimeoutError):
                await until(lambda: nodes.api.scalings()[1:], 1.5)
            assert nodes.api.scalings()[1:] == ([(1, 0)] if missing == "endpointslices" else [])

    run(test())


def test_the_example_is_valid_and_its_models_are_read(tmp_path):
    documents = list(yaml.safe_load_all((REPO / "examples" / "kubernetes_proxy.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    (config,) = (each["data"]["models.yaml"] for each in documents if each["kind"] == "ConfigMap")
    (tmp_path / "models.yaml").write_text(config)
    models = load(tmp_path / "models.yaml").models
    assert {model.upstream for model in models.values()} == {"k8s://models/llama:8000", "k8s://models/qwen:8000"}


@pytest.mark.parametrize("missing", ["pods", "deployments/scale"])
def test_without_the_role_the_held_request_says_so(tmp_path, missing):
    async def test():
        async with at_zero(tmp_path, without=missing) as (nodes, proxy):
            answer = await proxy.ask("r")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "cluster-forbidden"

    run(test())
