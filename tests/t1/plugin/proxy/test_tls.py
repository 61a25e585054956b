"""The end of TLS connections: a client that does not take part in it holds nothing up."""

import asyncio
import logging
import socket
import ssl

import pytest

from plugin.proxy.http import downstream
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.server import ProxyServer
from plugin.proxy.tls import Certificates
from tests.kits.proxy.rig import LIMIT_S, run
from tests.kits.tls_kit import Authority

pytestmark = pytest.mark.t1


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


async def tls_proxy(authority):
    """Return a proxy that serves TLS, and what connects to it and sends a request."""
    pair, sock = authority.pair("server"), socket.create_server(("127.0.0.1", 0))
    server = ProxyServer(ReplicaPool())
    await server.start(sock, certificates=Certificates(str(pair.certificate), str(pair.key)))
    context = ssl.create_default_context(cafile=str(authority.file))

    def ask(head):
        client = context.wrap_socket(socket.create_connection(sock.getsockname()), server_hostname="localhost")
        client.settimeout(LIMIT_S)
        client.sendall(head)
        return client

    return server, ask


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
