"""A sandbox's way out, without an engine: what it reaches, which connections are closed, and names."""

import contextlib
import errno
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from checkpoint.errors import HostLacks
from checkpoint.sandbox import egress
from checkpoint.sandbox.egress import Egress
from checkpoint.sandbox.network import ADDRESS, close_outgoing, inside, is_inside
from checkpoint.sandbox.resolver import ResolverRelay, loopback_resolvers
from checkpoint.sandbox.sandbox import Sandbox, SandboxConfig

pytestmark = [pytest.mark.t1]


@pytest.fixture
def listener():
    """Return a TCP server at every address of this host, and its own address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("198.51.100.1", 9))  # sends nothing
        address = sock.getsockname()[0]
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.settimeout(30)
        yield server, (address, server.getsockname()[1])


@contextlib.contextmanager
def network_of(sandbox):
    fd = os.open(f"/proc/{sandbox.init_pid}/ns/net", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def tcp(network):
    with inside(network):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(30)
    return sock


def test_only_connections_that_leave_the_sandbox_are_closed(listener):
    server, outside = listener
    with Sandbox(SandboxConfig(egress=Egress.find())) as sandbox, network_of(sandbox) as network:
        sandbox.wait_egress()
        with tcp(network) as own, tcp(network) as leaving, tcp(network) as near, tcp(network) as also_near:
            own.bind(("0.0.0.0", 0))
            own.listen()
            port = own.getsockname()[1]
            leaving.connect(outside)
            near.connect((ADDRESS, port))
            also_near.connect(("127.0.0.1", port))
            peers = [server.accept()[0], own.accept()[0], own.accept()[0]]
            assert close_outgoing(network) == 1
            with pytest.raises(ConnectionAbortedError):
                leaving.recv(1)
            for kept, peer in zip((near, also_near), peers[1:], strict=True):
                kept.sendall(b"x")
                assert peer.recv(1) == b"x"
            assert close_outgoing(network) == 0
            for peer in peers:
                peer.close()


def test_loopback_of_the_host_is_reached_at_given_ports_only(listener):
    server, (_, port) = listener
    with socket.create_server(("127.0.0.1", 0)) as hidden:
        config = SandboxConfig(egress=Egress.find((port,)))
        with Sandbox(config) as sandbox, network_of(sandbox) as network:
            sandbox.wait_egress()
            with tcp(network) as sock, tcp(network) as refused:
                sock.connect(("127.0.0.1", port))
                with server.accept()[0] as peer:
                    with pytest.raises(ConnectionRefusedError):
                        refused.connect(("127.0.0.1", hidden.getsockname()[1]))
                    assert close_outgoing(network, (port,)) >= 1
                    peer.settimeout(30)
                    with pytest.raises((ConnectionAbortedError, ConnectionResetError)):  # either end is closed first
                        sock.recv(1)


def test_a_sandbox_without_a_way_out_reaches_nothing(listener):
    with (
        Sandbox(SandboxConfig()) as sandbox,
        network_of(sandbox) as network,
        tcp(network) as sock,
        pytest.raises(OSError, match="unreachable"),
    ):
        sock.connect(listener[1])


def test_a_pasta_that_cannot_be_started_again_at_once_is_tried_until_it_can(monkeypatch, caplog):
    begin, refused = egress.WayOut._begin, []

    def start(way_out, output):
        if refused and refused.pop():
            raise BlockingIOError(errno.EAGAIN, "no process is left")
        return begin(way_out, output)

    monkeypatch.setenv("SECRET", "of the engine")
    monkeypatch.setattr(egress, "AGAIN_S", 0.02)
    monkeypatch.setattr(egress.WayOut, "_begin", start)
    with Sandbox(SandboxConfig(egress=Egress.find())) as sandbox:
        sandbox.wait_egress()
        refused.append(True)
        first = sandbox._way_out._process
        assert "SECRET" not in Path(f"/proc/{first.pid}/environ").read_text()
        first.kill()
        limit = time.monotonic() + 30
        while sandbox._way_out._process is first:
            assert time.monotonic() < limit, caplog.text
            time.sleep(0.01)
        sandbox.wait_egress()
    assert caplog.text.count("egress-ended: ") == 2 and "could not be started" in caplog.text


def test_a_missing_pasta_is_named(monkeypatch):
    monkeypatch.setenv("QUICKTHAW_PASTA", "/nowhere")
    with pytest.raises(HostLacks, match="passt"):
        Egress.find()


def test_names_are_asked_of_the_hosts_loopback(tmp_path):
    file = tmp_path / "resolv.conf"
    file.write_text(
        "# ours\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver ::1\nnameserver\nnameserver 127.0.0.53\n"
    )
    assert loopback_resolvers(file) == (("127.0.0.53", 53),)
    assert loopback_resolvers(tmp_path / "none") == ()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, Sandbox(SandboxConfig()) as sandbox:
        server.bind(("127.0.0.53", 0))
        server.settimeout(30)
        with network_of(sandbox) as network:
            relay = ResolverRelay(network, [server.getsockname()])
            try:
                with inside(network):
                    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
                for number, client in enumerate(clients):
                    client.settimeout(30)
                    client.sendto(b"who is %d" % number, server.getsockname())
                for _ in clients:
                    query, sender = server.recvfrom(100)
                    server.sendto(query.replace(b"who", b"this"), sender)
                for number, client in enumerate(clients):
                    assert client.recvfrom(100) == (b"this is %d" % number, server.getsockname())
                    client.close()
            finally:
                relay.close()
    assert "resolver" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        (ADDRESS, True),
        (f"::ffff:{ADDRESS}", True),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.2.2", False),
        ("::ffff:1.2.3.4", False),
        ("2001:db8::1", False),
    ],
)
def test_addresses_of_a_sandbox(address, own):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    assert is_inside(socket.inet_pton(family, address)) == own
