"""Who is asked for a chunk, and how a list of peers is read."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from lazyfs.cli.peer import peer
from lazyfs.content.chunk_store import digest_of
from lazyfs.errors import Usage
from lazyfs.peers import order
from lazyfs.peers.client import Peers, Wanted
from lazyfs.peers.endpoint_slices import Service, endpoints
from lazyfs.peers.order import DEFAULT_PORT, FANOUT, Address, Members, own_address, parse_peers, ranked, sources

pytestmark = pytest.mark.t0
DIGESTS = [digest_of(bytes([i, j])) for i in range(32) for j in range(32)]


def peers(count):
    return [Address(f"10.0.0.{i}", 9470) for i in range(count)]


def test_every_host_asks_the_same_peer_whatever_the_order_of_its_list():
    assert all(ranked(digest, peers(8)) == ranked(digest, peers(8)[::-1]) for digest in DIGESTS[:50])


def test_a_chunk_spreads_along_a_tree_without_circles_and_every_host_sends_as_much_as_it_receives():
    hosts, sent, digests = peers(20), Counter(), DIGESTS[:200]
    for digest in digests:
        order = ranked(digest, hosts)
        asked = {one: sources(digest, hosts, one) for one in hosts}
        assert asked[order[0]] == [], "the first one asks the store"
        assert all(order.index(source) < order.index(one) for one, found in asked.items() for source in found)
        first = Counter(found[0] for found in asked.values() if found)
        assert max(first.values()) <= FANOUT
        sent.update(first)
    assert sum(sent.values()) == 19 * len(digests) and max(sent.values()) < 1.5 * len(digests)


def test_a_host_that_does_not_know_itself_asks_the_first_ranks():
    digest, hosts = DIGESTS[0], peers(8)
    assert sources(digest, hosts, None) == ranked(digest, hosts)[:4]
    assert sources(digest, hosts[:1], hosts[0]) == []


def test_a_mount_whose_server_is_gone_asks_whoever_fetches_its_hosts_chunks_now():
    """Else each of its host's chunks leaves the store twice: for it, and for all others."""
    digest, hosts = DIGESTS[0], peers(8)
    order = ranked(digest, hosts)
    assert sources(digest, hosts, order[0], serves=False) == order[1:5]
    assert sources(digest, hosts, order[2], serves=False) == [order[0], order[1], order[3], order[4]]
    known = Peers(Members(",".join(map(str, hosts)), str(order[0])), "")
    assert known._candidates(digest, relay=True) == []
    assert known._candidates(digest, relay=False) == order[:5]
    known._failed(order[0], "silent")
    assert known._candidates(digest, relay=False) == order[1:5]


def test_a_host_knows_itself_by_its_address():
    assert own_address([Address("127.0.0.1", 1), *peers(3)]) == Address("127.0.0.1", 1)
    assert own_address([Address("127.0.0.1", 1), Address("127.0.0.1", 2)]) is None, "two are of this host"
    assert Members("127.0.0.1:1,127.0.0.1:2", "127.0.0.1:2").me == Address("127.0.0.1", 2)


def test_chunks_are_spread_evenly_and_only_those_of_a_lost_peer_move():
    first = {digest: ranked(digest, peers(8))[0] for digest in DIGESTS}
    shares = Counter(first.values())
    assert len(shares) == 8 and max(shares.values()) < 1.4 * len(DIGESTS) / 8
    lost = peers(8)[3]
    left = [one for one in peers(8) if one != lost]
    moved = {digest for digest in DIGESTS if ranked(digest, left)[0] != first[digest]}
    assert moved == {digest for digest in DIGESTS if first[digest] == lost}
    assert len({ranked(digest, left)[0] for digest in moved}) == 7, "to all others, not to one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ((), (), ())),
        ("a:1, b ,a:1", ((Address("a", 1), Address("b", DEFAULT_PORT)), (), ())),
        (
            "[::1]:5,fe80::1,[::2]",
            ((Address("::1", 5), Address("fe80::1", DEFAULT_PORT), Address("::2", DEFAULT_PORT)), (), ()),
        ),
        ("dns://peers:7,x", ((Address("x", DEFAULT_PORT),), (Address("peers", 7),), ())),
        (
            "k8s://models/peers, k8s://models/peers:7,x",
            ((Address("x", DEFAULT_PORT),), (), (Service("models", "peers"), Service("models", "peers", 7))),
        ),
    ],
)
def test_a_list_of_peers_is_read(text, expected):
    assert parse_peers(text) == expected


@pytest.mark.parametrize("text", ["http://a", "a:0", "a:x", "a:99999", "dns://", ":5"])
def test_what_is_no_list_of_peers_is_refused(text):
    with pytest.raises(Usage, match="HOST:PORT"):
        parse_peers(text)


@pytest.mark.parametrize("text", ["k8s://a", "k8s://a/b:0", "k8s://a/b:x", "k8s://a/b/c", "k8s://A/b", "k8s:///b"])
def test_what_names_no_service_is_refused(text):
    with pytest.raises(Usage, match="k8s://NAMESPACE/SERVICE"):
        parse_peers(text)


def test_a_service_needs_the_extra(monkeypatch):
    monkeypatch.setattr("lazyfs.peers.endpoint_slices.importlib.util.find_spec", lambda _: None)
    with pytest.raises(Usage, match=r"quickthaw\[kubernetes\]") as raised:
        parse_peers("k8s://models/peers")
    assert raised.value.code == "kubernetes-missing"


@pytest.mark.parametrize("text", ["dns://a", "a:1,b:1", "a:x", "k8s://a/b"])
def test_a_host_is_at_one_address(text):
    with pytest.raises(Usage, match="HOST:PORT"):
        Members("a:1,b:1", text)


def test_a_name_that_no_dns_has_leaves_the_other_peers(caplog):
    members = Members("dns://" + "a" * 64 + ":7,10.0.0.1:7")
    try:
        members._resolve()
        assert members.now == (Address("10.0.0.1", 7),) and "the peers are as before" in caplog.text
    finally:
        members.close()


def test_names_are_resolved_and_stay_when_the_name_server_fails(monkeypatch):
    answers = [[(0, 0, 0, "", ("10.0.0.1", 7)), (0, 0, 0, "", ("10.0.0.2", 7))]]

    def resolve(*_, **__):
        if not answers:
            raise OSError("no answer")
        return answers.pop()

    monkeypatch.setattr(order.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(order, "_REFRESH_S", 0.01)
    members = Members("dns://peers:7,a:1")
    try:
        expected = (Address("a", 1), Address("10.0.0.1", 7), Address("10.0.0.2", 7))
        assert members.now == expected
        members._resolve()
        assert members.now == expected
    finally:
        members.close()


def test_a_host_with_an_address_of_each_family_is_one_peer(monkeypatch):
    """Twice, it would get twice its share, and would not know itself."""
    answers = {"both": ["::1", "10.0.0.1"], "six": ["::2"]}
    monkeypatch.setattr(
        order.socket, "getaddrinfo", lambda host, *_, **__: [(2, 2, 0, "", (a, 7)) for a in answers.get(host, [host])]
    )
    members = Members("dns://both:7,dns://six:7")
    try:
        assert members.now == (Address("10.0.0.1", 7), Address("::2", 7))
    finally:
        members.close()


def endpoint_slice(kind, endpoints, ports=()):
    return SimpleNamespace(
        addressType=kind,
        ports=[SimpleNamespace(name=name, port=port) for name, port in ports],
        endpoints=[
            SimpleNamespace(addresses=[address], conditions=SimpleNamespace(ready=ready))
            for address, ready in endpoints
        ],
    )


def test_the_ready_endpoints_of_a_service_are_its_peers():
    slices = [
        endpoint_slice("IPv4", [("10.0.0.2", True), ("10.0.0.3", False)], [("peer", 5), ("admin", 6)]),
        endpoint_slice("IPv4", [("10.0.0.1", None)], [("http", 7)]),
        endpoint_slice("IPv6", [("fd00::1", True)], [("peer", 5)]),
        SimpleNamespace(addressType="IPv4", ports=None, endpoints=None),
    ]
    assert endpoints(slices, None, 9470) == [("10.0.0.1", 7), ("10.0.0.2", 5)]
    assert endpoints(slices, 8, 9470) == [("10.0.0.1", 8), ("10.0.0.2", 8)]
    assert endpoints(slices[2:], None, 9470) == [("fd00::1", 5)]
    two = endpoint_slice("IPv4", [("10.0.0.1", True)], [("a", 1), ("b", 2)])
    assert endpoints([two], None, 9470) == [("10.0.0.1", 9470)]


def test_no_fetch_waits_for_a_name_server(monkeypatch):
    """Neither for the name of a listed peer, nor to know which one is this host."""
    asked, answer = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def resolve(host, *rest, **more):
        if host != "host-a":
            return real(host, *rest, **more)
        asked.set()
        answer.wait(10)
        return [(0, 0, 0, "", ("::1", 7)), (0, 0, 0, "", ("127.0.0.1", 7))]

    monkeypatch.setattr(order.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(order, "_FIRST_S", 0.01)
    began = time.monotonic()
    known = Peers(Members("host-a:7,10.0.0.1:7"), "", silence_s=0.01)
    known._failed(Address("10.0.0.1", 7), "not in this test")
    try:
        assert asked.wait(5) and known.members.me is None
        assert known.get(Wanted("0" * 64, 4, 0, "0" * 64, 0, 0), memoryview(bytearray(4))) is None
        assert time.monotonic() - began < 5, "a name server that is silent is waited for in a thread only"
        answer.set()
        known.members._resolve()
        assert known.members.place(Address("host-a", 7)) == "127.0.0.1", "where servers listen by default"
        assert known.members.me == Address("host-a", 7)
    finally:
        answer.set()
        known.close()


@pytest.mark.parametrize("words", [[":0"], ["[::1:2]:0"], ["localhost.example.com:0"], [":0", "--peer-token", "\n"]])
def test_a_peer_that_others_reach_needs_a_token(words, tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    result = CliRunner().invoke(peer, ["--listen", *words])
    assert result.exit_code == 2 and "peer-token" in result.output


def test_a_peer_that_lied_stays_out_though_it_was_right_in_another_thread():
    known, (liar, other) = Peers(Members(""), ""), peers(2)
    known._failed(liar, "it sent wrong bytes", lied=True)
    known._failed(other, "silent")
    known._works(liar)
    known._works(other)
    assert known._has_failed(liar) and not known._has_failed(other)


def test_one_pause_of_a_peer_is_one_failure_however_much_was_under_way(monkeypatch):
    """Counted for each chunk, half a second of silence left a peer out for half a minute, and everybody asked the store."""
    now = [1000.0]
    monkeypatch.setattr("lazyfs.peers.client.time.monotonic", lambda: now[0])
    known, (busy, _) = Peers(Members(""), ""), peers(2)
    for _ in range(16):
        known._failed(busy, "silent")
    assert known._states[busy].out_until == now[0] + 0.5
    now[0] += 0.6
    known._failed(busy, "silent")
    assert known._states[busy].out_until == now[0] + 1.0


def test_a_slow_peer_gets_its_time_again_and_one_that_is_gone_does_not():
    known, (slow, gone) = Peers(Members(""), ""), peers(2)
    for one in (slow, gone):
        known._heard[one] = time.monotonic()
        known._failed(one, "silent")
    assert known._has_failed(slow) and known._has_failed(gone)
    known._heard[slow] = time.monotonic()
    assert not known._has_failed(slow) and known._has_failed(gone)


def test_a_name_server_that_is_down_is_logged_once_not_every_ten_seconds(caplog):
    members = Members("dns://" + "a" * 64 + ":7,b" + "b" * 64 + ":7")
    try:
        for _ in range(5):
            members._resolve()
        assert caplog.text.count("the peers are as before") == 1 and caplog.text.count("is where it was") == 1
    finally:
        members.close()
