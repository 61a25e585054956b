"""TLS connections whose client does not take part in their handshake or end: each counts, and none holds anything up."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl

import pytest

from plugin.proxy import tls_listener
from plugin.proxy.http import downstream
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from plugin.proxy.tls import Certificates
from tests.kits.proxy.rig import LIMIT_S, run, until
from tests.kits.tls_kit import Authority

pytestmark = pytest.mark.t1


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


async def tls_proxy(authority, settings=None):
    """Return a proxy that serves TLS, and what connects to it and sends a request."""
    pair, sock = authority.pair("server"), socket.create_server(("127.0.0.1", 0))
    server = ProxyServer(ReplicaPool(), settings)
    await server.start(sock, certificates=Certificates(str(pair.certificate), str(pair.key)))
    context = ssl.create_default_context(cafile=str(authority.file))

    def ask(head):
        client = context.wrap_socket(socket.create_connection(sock.getsockname()), server_hostname="localhost")
        client.settimeout(LIMIT_S)
        client.sendall(head)
        return client

    return server, ask


@pytest.mark.slow
def test_an_idle_client_does_not_hold_up_the_end(authority, monkeypatch, caplog):
    """It keeps its connection in a pool, and so does not answer the end of its TLS."""
    monkeypatch.setattr(downstream, "_TLS_END_S", 0.1)

    async def main():
        server, ask = await tls_proxy(authority)
        with await asyncio.to_thread(ask, b"GET /-/status HTTP/1.1\r\nhost: localhost\r\n\r\n") as client:
            assert (await asyncio.to_thread(client.recv, 4096)).startswith(b"HTTP/1.1 200")
            with caplog.at_level(logging.WARNING):
                await server.shutdown(LIMIT_S - 5)

    run(main(), loop="asyncio")
    assert "clients cut" not in caplog.text


def test_an_answer_that_closes_ends_at_once(authority, monkeypatch):
    monkeypatch.setattr(downstream, "_LINGER_S", 10 * LIMIT_S)

    async def main():
        server, ask = await tls_proxy(authority)

        def read():
            with ask(b"no request\r\n\r\n") as client:
                return b"".join(iter(lambda: client.recv(4096), b""))

        assert (await asyncio.to_thread(read)).startswith(b"HTTP/1.1 400")
        await server.shutdown(LIMIT_S)

    run(main(), loop="asyncio")


STATUS = b"GET /-/status HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


def answer_of(ask):
    with ask(STATUS) as client:
        return b"".join(iter(lambda: client.recv(4096), b""))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_client_that_never_finishes_its_handshake_counts_and_is_cut(authority, loop):
    async def main():
        server, ask = await tls_proxy(authority, Settings(max_clients=3, head_timeout_s=2.0))
        address = server.listens_at.rpartition(":")[2]
        silent = [socket.create_connection(("127.0.0.1", int(address))) for _ in range(3)]
        await until(lambda: len(server.handshakes) == 3)
        refused = await asyncio.to_thread(answer_of, ask)
        assert refused.startswith(b"HTTP/1.1 503") and b"too-many-clients" in refused
        for one in silent:
            one.settimeout(LIMIT_S)
            assert await asyncio.to_thread(one.recv, 1) == b""
            one.close()
        await until(lambda: not server.handshakes)
        assert (await asyncio.to_thread(answer_of, ask)).startswith(b"HTTP/1.1 200")
        await server.shutdown(LIMIT_S)

    run(main(), loop=loop)


def test_connections_far_over_the_limit_get_no_handshake(authority, monkeypatch):
    monkeypatch.setattr(tls_listener, "_REFUSED_IN_HTTP", 0)

    async def main():
        server, ask = await tls_proxy(authority, Settings(max_clients=1))
        with await asyncio.to_thread(ask, STATUS[:10]):
            await until(lambda: len(server.clients) == 1)
            with pytest.raises(OSError):
                await asyncio.to_thread(answer_of, ask)
        await until(lambda: not server.clients)
        assert (await asyncio.to_thread(answer_of, ask)).startswith(b"HTTP/1.1 200")
        await server.shutdown(LIMIT_S)

    run(main())


def test_files_that_change_while_they_are_read_again_spoil_nothing(authority, monkeypatch, caplog):
    """The key comes after the certificate was read: both are read again at the next look."""
    pair, new = authority.pair("server"), authority.pair("new")
    certificates = Certificates(str(pair.certificate), str(pair.key), refresh=True)
    load = ssl.SSLContext.load_cert_chain

    def half_way(context, certificate, *more):
        load(context, certificate, *more)
        pair.key.write_bytes(new.key.read_bytes())

    def subject():
        ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = certificates.context.wrap_bio(ours, theirs, server_side=True)
        trusting = ssl.create_default_context(cafile=str(authority.file))
        client = trusting.wrap_bio(theirs, ours, server_hostname="localhost")
        for one in (client, server) * 3:
            with contextlib.suppress(ssl.SSLWantReadError):
                one.do_handshake()
        return dict(name[0] for name in client.getpeercert()["subject"])["commonName"]

    os.utime(pair.certificate)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(ssl.SSLContext, "load_cert_chain", half_way)
        certificates.reload()
        assert subject() == "server"
        certificates.reload()
        assert subject() == "server"
    pair.certificate.write_bytes(new.certificate.read_bytes())
    certificates.reload()
    assert subject() == "new"
    (warning,) = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning.startswith("tls-files: ")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_failed_and_unfinished_handshakes_leave_nothing(authority, loop, caplog):
    async def main():
        server, ask = await tls_proxy(authority)
        port = int(server.listens_at.rpartition(":")[2])
        assert (await asyncio.to_thread(answer_of, ask)).startswith(b"HTTP/1.1 200")
        await until(lambda: not server.clients)
        before = len(os.listdir("/proc/self/fd"))
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.to_thread(lambda: list(iter(lambda: client.recv(4096), b"")))
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"\x16\x03\x01")
            await until(lambda: server.handshakes)
        await until(lambda: not server.handshakes)
        unfinished = socket.create_connection(("127.0.0.1", port))
        await until(lambda: server.handshakes)
        await server.shutdown(LIMIT_S)
        unfinished.settimeout(LIMIT_S)
        assert await asyncio.to_thread(unfinished.recv, 1) == b""
        unfinished.close()
        await until(lambda: len(os.listdir("/proc/self/fd")) < before)

    run(main(), loop=loop)
    assert not caplog.records
