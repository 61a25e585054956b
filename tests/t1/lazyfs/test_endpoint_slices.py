"""Peers of a Service, followed through an API that is slow, away, forbids, and forgets."""

import asyncio
import logging

import pytest
import yaml

pytest.importorskip("lightkube")

from lazyfs.peers import endpoint_slices
from lazyfs.peers.order import Address, Members, parse_peers
from tests.kits.chart_kit import VERSIONS, validate
from tests.kits.cluster.api import Api
from tests.kits.cluster.rig import run, until
from tests.kits.lazyfs.rig import ROOT

pytestmark = [pytest.mark.t1, pytest.mark.slow]


def put(api, name, *hosts, service="peers", ready=True):
    api.put(
        "endpointslices",
        {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "ports": [{"name": "peer", "port": 9470}],
            "endpoints": [{"addresses": [host], "conditions": {"ready": ready}} for host in hosts],
        },
    )


def at(*hosts):
    return tuple(Address(host, 9470) for host in hosts)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(endpoint_slices, "_PAUSE_S", 0.05)
    monkeypatch.setattr(endpoint_slices, "_PAUSE_MOST_S", 0.2)
    monkeypatch.setattr(endpoint_slices, "_REOPEN_S", 0.05)


def with_members(folder, monkeypatch, body, text="k8s://models/peers", before=lambda api: put(api, "a", "10.0.0.1")):
    async def inner():
        api = Api()
        await api.start()
        before(api)
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(folder)))
        members = await asyncio.to_thread(Members, text)
        try:
            await body(api, members)
        finally:
            members.close()
            await api.stop()

    run(inner())


@pytest.mark.usefixtures("soon")
def test_peers_come_and_go_with_their_slices_and_one_list_is_enough(tmp_path, monkeypatch):
    async def body(api, members):
        assert members.now == at("10.0.0.1"), "known before the first fetch"
        put(api, "other", "10.0.9.9", service="another")
        put(api, "b", "10.0.0.2", "10.0.0.3")
        await until(lambda: members.now == at("10.0.0.1", "10.0.0.2", "10.0.0.3"))
        put(api, "a", "10.0.0.1", ready=False)
        await until(lambda: members.now == at("10.0.0.2", "10.0.0.3"))
        api.remove("endpointslices", "b")
        put(api, "a", "127.0.0.1")
        await until(lambda: members.now == at("127.0.0.1"))
        assert members.me == at("127.0.0.1")[0], "a host knows itself here, too"
        assert api.calls["list", "endpointslices"] == 1

    with_members(tmp_path, monkeypatch, body)


@pytest.mark.usefixtures("soon")
def test_while_the_api_is_away_the_peers_are_as_they_were_and_afterwards_as_they_are(tmp_path, monkeypatch, caplog):
    async def body(api, members):
        await until(lambda: api._watching)
        await api.stop()
        # Also a watch that was opened while the API went away.
        await until(lambda: api.drop_watches() or "the peers of k8s://models/peers are as before" in caplog.text)
        assert members.now == at("10.0.0.1")
        put(api, "a", "10.0.0.7")
        api.compact()  # whatever was missed shows in a list
        await api.start()
        await until(lambda: members.now == at("10.0.0.7"))

    with_members(tmp_path, monkeypatch, body)


@pytest.mark.usefixtures("soon")
def test_a_watch_that_is_too_old_begins_with_a_list(tmp_path, monkeypatch):
    async def body(api, members):
        put(api, "b", "10.0.0.2")
        await until(lambda: len(members.now) == 2)
        api.drop_watches()
        api.remove("endpointslices", "b")
        api.compact()
        await until(lambda: members.now == at("10.0.0.1"))

    with_members(tmp_path, monkeypatch, body)


@pytest.mark.usefixtures("soon")
def test_a_role_that_is_missing_is_said_once_with_the_remedy(tmp_path, monkeypatch, caplog):
    def forbid(api):
        put(api, "a", "10.0.0.1")
        api.allowed = {}

    async def body(api, members):
        assert members.now == at("10.9.9.9"), "the others are asked meanwhile"
        await until(lambda: api.calls["list", "endpointslices"] >= 3)
        lines = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(lines) == 1 and "list and watch of endpointslices" in lines[0].message
        api.allowed = {"endpointslices": ("list", "watch")}  # the role that the documentation gives is enough
        await until(lambda: members.now == at("10.9.9.9", "10.0.0.1"))

    with_members(tmp_path, monkeypatch, body, "k8s://models/peers,10.9.9.9:9470", forbid)


def test_an_api_that_fails_at_once_is_asked_at_a_bounded_rate(tmp_path, monkeypatch):
    async def body(api, members):
        api.faults.failing = 1000
        api.drop_watches()
        await asyncio.sleep(3)
        assert members.now == at("10.0.0.1")
        assert 1 <= 1000 - api.faults.failing <= 6

    with_members(tmp_path, monkeypatch, body)


def test_watches_that_end_at_once_are_opened_at_a_bounded_rate(tmp_path, monkeypatch):
    async def ended(*_):
        return
        yield

    async def body(api, members):
        api._stream = ended
        api.drop_watches()
        before = api.calls["watch", "endpointslices"]
        await asyncio.sleep(3)
        assert 1 <= api.calls["watch", "endpointslices"] - before <= 4

    with_members(tmp_path, monkeypatch, body)


def test_the_example_is_valid_and_has_the_role_that_is_enough():
    objects = list(yaml.safe_load_all((ROOT / "examples" / "kubernetes_peers.yaml").read_text()))
    for one in objects:
        for version in VERSIONS:
            validate(one, version)
    kinds = {one["kind"]: one for one in objects}
    assert kinds["Role"]["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    (container,) = kinds["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    (service,) = parse_peers(next(each["value"] for each in container["env"] if each["name"] == "QUICKTHAW_PEERS"))[2]
    assert (service.namespace, service.name) == ("models", kinds["Service"]["metadata"]["name"])


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("config", [None, "clusters: [\n"], ids=["none", "damaged"])
def test_without_a_cluster_the_other_peers_serve(tmp_path, monkeypatch, caplog, config):
    if config is not None:
        (tmp_path / "config").write_text(config)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    members = Members("k8s://models/peers,10.9.9.9:9470")
    try:
        assert members.now == at("10.9.9.9") and "the peers of k8s://models/peers are as before" in caplog.text
    finally:
        members.close()
