"""What goes wrong between a proxy and its cluster: watches that are cut, Leases that are not heard, what nodes say in public."""

import asyncio
import contextlib
import gc
import json
import threading
import warnings
from types import SimpleNamespace

import pytest
from lightkube.resources.coordination_v1 import Lease
from lightkube.resources.core_v1 import Pod

from capacity.cluster.api import Api
from capacity.errors import CapacityError
from lazyfs.peers import endpoint_slices
from plugin.proxy.errors import StartFailed
from plugin.proxy.kubernetes import agreement, cluster, workload
from plugin.proxy.kubernetes.address import parse
from plugin.proxy.kubernetes.agreement import Agreement
from plugin.proxy.kubernetes.asking import Asker, WorkloadSpec
from plugin.proxy.kubernetes.cluster import cluster_error
from plugin.proxy.kubernetes.informer import Informer
from plugin.proxy.kubernetes.keda import Demand
from plugin.proxy.kubernetes.pods import state_of
from plugin.proxy.kubernetes.session import Session
from plugin.proxy.kubernetes.workload import Workload

pytestmark = pytest.mark.t0


class Listing:
    """What a list of the client's returns."""

    def __init__(self, objects):
        self.objects, self.resourceVersion = objects, "1"

    async def __aiter__(self):
        for one in self.objects:
            yield one


class Client:
    """Lists `objects`; each watch is the next of `watches`: events, then an error if one is named, else silence."""

    def __init__(self, objects, *watches):
        self.objects, self.watches, self.lists = objects, list(watches), 0

    def list(self, *_, **__):
        self.lists += 1
        return Listing(self.objects)

    async def watch(self, *_, **__):
        for one in self.watches.pop(0) if self.watches else ():
            if isinstance(one, Exception):
                raise one
            yield one
        await asyncio.sleep(60)


def named(name, version="2", **fields):
    return Pod.from_dict({"metadata": {"name": name, "resourceVersion": version}, **fields})


async def until(what, limit_s=5.0):
    async with asyncio.timeout(limit_s):
        while not what():  # noqa: ASYNC110 - what is awaited belongs to the code under test
            await asyncio.sleep(0.005)


def follow(client, *callbacks, silent_s=60.0):
    """Run an informer until the last object, `z`, is seen; return it."""

    async def test():
        seen = Informer(SimpleNamespace(client=client, reported_away=False), Pod, "models", silent_s=silent_s)
        seen.changed.extend(callbacks)
        running = asyncio.create_task(seen.run())
        try:
            await until(lambda: "z" in seen.objects or running.done())
            assert not running.done(), "the copy ended"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return seen

    return asyncio.run(test())


def test_a_watch_whose_last_line_was_cut_off_is_opened_again():
    cut = [("ADDED", named("a")), json.JSONDecodeError("Unterminated string", '{"type"', 7)]
    assert set(follow(Client([], cut, [("ADDED", named("z"))])).objects) == {"a", "z"}


def test_a_watch_that_breaks_twice_is_followed_by_a_list():
    client = Client([], [OSError("cut")], [OSError("cut")], [("ADDED", named("z"))])
    follow(client)
    assert client.lists == 2


def test_a_watch_in_which_nothing_comes_is_opened_again():
    client = Client([], [], [], [("ADDED", named("z"))])
    follow(client, silent_s=0.02)
    assert client.lists == 1, "silence is no failure, after which it would list anew"


def test_a_callback_that_fails_is_logged_and_ends_neither_the_copy_nor_the_others(caplog):
    seen = []

    def fails():
        raise KeyError("no such phase")

    follow(Client([], [("ADDED", named("a")), ("ADDED", named("z"))]), fails, lambda: seen.append(1))
    assert len(seen) == 3 and "no such phase" in caplog.text  # the list and two events


def lease(name, version, note):
    return Lease.from_dict(
        {
            "metadata": {"name": name, "resourceVersion": version, "annotations": {"quickthaw.dev/agreement": note}},
            "spec": {"holderIdentity": name},
        }
    )


def shared(busy=False):
    """Return a workload as the agreement sees it."""
    held = []

    async def settle():
        return None

    return SimpleNamespace(address=parse("k8s://models/llama"), busy=busy, hold=held.append, settle=settle, held=held)


@contextlib.asynccontextmanager
async def circle_of(one, *leases):
    """Yield an agreement, and its circle with these Leases heard a moment ago. Nothing is sent to an API."""
    agreed = Agreement(SimpleNamespace(client=None), "me")
    agreed._write_quietly = agreed._write = lambda circle: asyncio.sleep(0)
    circle = agreement._Circle("models", SimpleNamespace(objects={}, listed=asyncio.Event()))
    agreed._circles["models"], circle.registered = circle, True
    circle.workloads["deployment/llama"] = one
    circle.leases.listed.set()
    circle.leases.objects.update({each.metadata.name: each for each in leases})
    agreed._heard(circle)
    try:
        yield agreed, circle
    finally:
        await agreed._background.close()


SERVES = json.dumps({"serves": ["deployment/llama"]})


@pytest.mark.parametrize("note", ['{"serves": 1, "wants": ["x"], "answers": "no"}', '{"wants": {"deployment/llama": 7}}', "[]", "[" * 99999])  # fmt: skip
def test_a_lease_that_others_wrote_ends_nothing(note):
    async def test():
        one = shared()
        async with circle_of(one, lease("odd", "1", note), lease("b", "1", SERVES)) as (agreed, circle):
            assert [other.serves for other in agreed._serving(circle, "deployment/llama")] == [{"deployment/llama"}]
            assert circle.others["odd"].wants == circle.others["odd"].answers == {} and not one.held

    asyncio.run(test())


def test_a_proxy_whose_lease_is_not_written_asks_for_no_quiet():
    async def test():
        one = shared()
        async with circle_of(one) as (agreed, circle):
            async with agreed.quiet(one):
                pass
            circle.registered = False
            with pytest.raises(StartFailed, match="not written yet"):
                async with agreed.quiet(one):
                    pass

    asyncio.run(test())


def test_an_answer_is_forgotten_with_the_wish():
    async def test():
        one = shared(busy=True)
        wish = json.dumps({"serves": ["deployment/llama"], "wants": {"deployment/llama": "token"}})
        async with circle_of(one, lease("b", "1", wish)) as (agreed, circle):
            assert circle.answers == {"token": "no"}
            circle.leases.objects["b"] = lease("b", "2", SERVES)
            agreed._heard(circle)
            assert circle.answers == {}

    asyncio.run(test())


def test_a_proxy_that_hears_nothing_of_the_leases_takes_nobody_for_dead(monkeypatch):
    monkeypatch.setattr(agreement, "ASK_S", 0.05)
    now = [1000.0]
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def quiet(agreed, one):
        async with agreed.quiet(one):
            return True

    async def test():
        one = shared()
        async with circle_of(one, lease("b", "1", SERVES)) as (agreed, circle):
            now[0] += 2 * agreement.VALID_S  # cut off
            with pytest.raises(StartFailed, match="nothing was heard of the Leases"):
                await quiet(agreed, one)
            agreed._heard(circle)  # the API is back, and b has not renewed yet
            with pytest.raises(StartFailed, match="did not answer"):
                await quiet(agreed, one)
            for _ in range(4):
                now[0] += agreement.RENEW_S  # heard of all the while, but not of b: dead
                agreed._heard(circle)
            assert await quiet(agreed, one)

    asyncio.run(test())


def test_what_a_node_says_is_for_the_log_and_not_for_clients():
    waiting = {"reason": "ErrImagePull", "message": "failed to pull\nregistry.internal/secret/llama:1"}
    status = {
        "containerStatuses": [
            {"name": "engine", "image": "", "imageID": "", "ready": False, "restartCount": 0, "state": {"waiting": waiting}}
        ]
    }  # fmt: skip
    pod = Pod.from_dict(
        {"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [], "nodeName": "n"}, "status": status}
    )
    fault = state_of(pod, {}, parse("k8s://models/llama")).fault
    assert fault.message == "container engine: ErrImagePull"
    assert fault.whole == "container engine: ErrImagePull: failed to pull registry.internal/secret/llama:1"
    member = SimpleNamespace(faulty_since=0.0, fault=None, pod=SimpleNamespace(fault=fault))
    spec = WorkloadSpec(parse("k8s://models/llama"), schedule_grace_s=0.0)
    error = Workload._stuck(SimpleNamespace(_members={"u": member}, spec=spec))
    assert "registry" not in error.message and "registry.internal" in error.detail


def test_the_scheduler_s_sentence_is_one_line():
    said = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes:\n3 no GPU"}
    pod = Pod.from_dict({"metadata": {"name": "p"}, "spec": {"containers": []}, "status": {"conditions": [said]}})
    assert state_of(pod, {}, parse("k8s://models/llama")).fault.message == "0/3 nodes: 3 no GPU"


def test_the_progress_that_a_pod_tells_is_one_line_in_a_comment_of_a_stream(monkeypatch):
    body = json.dumps({"ready": False, "progress": "restoring\n\ndata: {}"}).encode()

    async def fetch(*_, **__):
        return 503, body

    monkeypatch.setattr("plugin.proxy.kubernetes.asking.fetch", fetch)
    replica = SimpleNamespace(upstream=object(), step="")
    asker = Asker(replica, WorkloadSpec(parse("k8s://models/llama")))
    assert asyncio.run(asker.not_ready()) == "it is starting"
    assert replica.step == "restoring data: {}"


def test_an_answer_that_cannot_be_read_has_a_code():
    async def test():
        async with cluster.Cluster(None, None, "models").errors():
            json.loads("<html>")

    with pytest.raises(StartFailed, match="sends what cannot be read") as raised:
        asyncio.run(test())
    assert raised.value.code == "cluster-unreachable" and cluster_error(raised.value) is raised.value


def test_a_wake_that_finds_the_workload_ends_the_pause_of_what_follows_its_pods(monkeypatch):
    monkeypatch.setattr(workload, "_AWAY_PAUSE_S", 60.0)
    asked, calls = [], []

    async def scale(_):
        calls.append(1)
        if len(calls) == 1:
            raise StartFailed("workload-not-found", "there is none yet")
        return SimpleNamespace(spec=SimpleNamespace(replicas=1), status=SimpleNamespace(selector="app=llama"))

    async def test():
        session = SimpleNamespace(cluster=SimpleNamespace(scale=scale))
        session.slices = lambda namespace: Informer(session.cluster, Pod, namespace)
        session.pods = lambda namespace, selector: asked.append(selector) or Informer(session.cluster, Pod, namespace)
        one = Workload("llama", WorkloadSpec(parse("k8s://models/llama")), session)
        following = asyncio.create_task(one._follow())
        await until(lambda: calls)
        await asyncio.sleep(0)
        await one._scale_up()
        await until(lambda: asked)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(test())


def test_a_workload_that_was_made_anew_with_another_selector_is_followed_from_the_next_wake_on():
    selectors, copies = iter(("app=old", "app=old", "app=new")), {}

    async def scale(_):
        return SimpleNamespace(spec=SimpleNamespace(replicas=1), status=SimpleNamespace(selector=next(selectors)))

    async def test():
        session = SimpleNamespace(cluster=SimpleNamespace(scale=scale))
        session.slices = lambda namespace: Informer(session.cluster, Pod, namespace)
        session.pods = lambda ns, selector: copies.setdefault(selector, Informer(session.cluster, Pod, ns))
        one = Workload("llama", WorkloadSpec(parse("k8s://models/llama")), session)
        async with asyncio.timeout(5):
            await one._follow()
        await one._scale_up()
        assert list(copies) == ["app=old"] and copies["app=old"].changed == [one._update]
        await one._scale_up()
        assert copies["app=old"].changed == [] and copies["app=new"].changed == [one._update]

    asyncio.run(test())


def test_endpoints_are_read_once_for_all_workloads_of_a_port():
    read = []

    def reading(slices, port):
        read.append(port)
        return {"n": len(list(slices))}

    async def test():
        session = Session(SimpleNamespace(client=Client([])), None)
        slices = session.slices("models")
        one, two, other = (parse(f"k8s://models/{name}") for name in ("a:80", "b:80", "c"))
        assert [session.listed(each, reading)["n"] for each in (one, two, other, one)] == [0] * 4
        slices.objects["s"] = object()
        slices._notify()
        assert session.listed(two, reading)["n"] == session.listed(one, reading)["n"] == 1
        await session._background.close()

    asyncio.run(test())
    assert read == [80, None, 80]


def test_a_copy_that_ends_says_so(caplog):
    async def test():
        session = Session(SimpleNamespace(client=None), None)  # no error that a cluster causes
        session.slices("models")
        await asyncio.wait(session._background._tasks)

    asyncio.run(test())
    assert "not followed any more" in caplog.text


def test_the_demand_is_never_below_zero():
    pool = SimpleNamespace(held=0, outstanding=0, probes=1)  # the pod that answers the probe has left
    assert Demand({"llama": pool}).requests("llama") == 0


def test_a_scale_that_names_no_pods_does_not_mean_all_of_the_namespace(monkeypatch):
    monkeypatch.setattr(workload, "_AWAY_PAUSE_S", 0.005)
    selectors, asked = iter((None, "", "app=llama")), []

    class Session:
        cluster = SimpleNamespace()

        def pods(self, namespace, selector):
            asked.append(selector)
            return Informer(self.cluster, Pod, namespace)

        slices = pods

    async def scale(_):
        text = next(selectors)
        status = None if text is None else SimpleNamespace(selector=text)
        return SimpleNamespace(spec=SimpleNamespace(replicas=0), status=status)

    async def test():
        session = Session()
        session.cluster.scale = scale
        session.slices = lambda namespace: Informer(session.cluster, Pod, namespace)
        one = Workload("llama", WorkloadSpec(parse("k8s://models/llama")), session)
        following = asyncio.create_task(one._follow())
        await until(lambda: asked or following.done())
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(test())
    assert asked == ["app=llama"]


def damaged_kubeconfig(folder, cluster_of):
    """Write a kubeconfig with a damaged part; return its path."""
    one = {"name": "x", "context": {"cluster": "x", "user": "x"}}
    cluster_of = {"server": "https://127.0.0.1:1"} | cluster_of
    document = {
        "current-context": "x", "contexts": [one], "clusters": [{"name": "x", "cluster": cluster_of}],
        "users": [{"name": "x", "user": {"token": "t"}}],
    }  # fmt: skip
    (folder / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    (folder / "config").write_text(json.dumps(document))
    return folder / "config"


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"certificate-authority": "ca.crt"}, "ca.crt"),
        ({"certificate-authority": "none.crt"}, "none.crt"),
        ({"certificate-authority-data": "bm9uc2Vuc2U="}, "config"),
        ({"certificate-authority-data": "no base64"}, "config"),
        (None, "KUBECONFIG"),
    ],
)
def test_certificates_that_cannot_be_read_are_named_with_their_file(tmp_path, monkeypatch, part, named):
    path = damaged_kubeconfig(tmp_path, part or {})
    if part is None:
        path.write_text("clusters: [\n")
    monkeypatch.setenv("KUBECONFIG", str(path))

    def said():
        with pytest.raises(ValueError, match="cluster-unknown") as proxys:
            cluster.Cluster.from_environment()
        with pytest.raises(CapacityError) as plans:
            Api.from_environment(threading.Event())
        assert plans.value.code == "cluster-unknown"
        yield from map(str, (proxys.value, plans.value))
        if part is not None:
            with pytest.raises(ValueError, match="certificates") as peers:
                endpoint_slices._client()
            yield str(peers.value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # lightkube leaves a file open if its content is no base64
        texts = list(said())
        gc.collect()
    for text in texts:
        assert named in text and "\n" not in text
