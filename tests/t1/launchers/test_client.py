"""The control client with a real socket: whatever a peer does, an answer or an OSError within the limit."""

import socket
import threading
import time

import pytest

from launchers.client import Client
from launchers.errors import EngineFailed
from plugin.proxy.errors import start_failed

pytestmark = pytest.mark.t1


@pytest.fixture
def peer():
    """A server that answers one connection with the given bytes, then closes it or stalls."""
    servers = []

    def serve(data, stall_s=0.0, split=None):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        seen = []

        def run():
            sock, _ = server.accept()
            with sock:
                seen.append(sock.recv(65536))
                for piece in [data[i : i + split] for i in range(0, len(data), split)] if split else [data]:
                    sock.sendall(piece)
                done.wait(stall_s)

        done = threading.Event()
        threading.Thread(target=run, daemon=True).start()

        def connect():
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
            return sock

        client = Client(connect, token="secret")
        client.seen, client.done = seen, done
        return client

    yield serve
    [server.close() for server in servers]


@pytest.mark.parametrize("split", [None, 1, 7])
def test_lengths_and_chunks_are_read_for_any_split(peer, split):
    plain = peer(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}', split=split)
    assert plain.json("GET", "/x") == {"a": 1}
    assert b"Authorization: Bearer secret" in plain.seen[0]
    chunked = peer(
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{"a"\r\n4\r\n: 2}\r\n0\r\n\r\n', split=split
    )
    assert chunked.json("POST", "/x", {"b": 1}) == {"a": 2}


def test_a_body_may_end_with_the_connection(peer):
    assert peer(b'HTTP/1.0 200 OK\r\n\r\n{"a": 3}').json("GET", "/x") == {"a": 3}


def test_an_error_has_the_engines_message(peer):
    with pytest.raises(EngineFailed, match="engine-refused: .* answered 503: no luck today"):
        peer(b"HTTP/1.1 503 X\r\nContent-Length: 13\r\n\r\nno luck today").json("GET", "/x")


@pytest.mark.parametrize("data", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}"])
def test_no_answer_is_an_error(peer, data):
    with pytest.raises(EngineFailed, match="engine-unreachable"):
        peer(data).json("GET", "/x")


@pytest.mark.slow
def test_a_stalling_peer_times_out(peer):
    client = peer(b"HTTP/1.1 200 OK\r\n", stall_s=20)
    began = time.monotonic()
    with pytest.raises(EngineFailed, match="engine-stalled"):
        client.json("GET", "/x", timeout_s=0.5)
    client.done.set()
    assert time.monotonic() - began < 15


def test_a_refused_connection_is_an_os_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

    def connect():
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(address)
        return sock

    with pytest.raises(EngineFailed, match="engine-unreachable"):
        Client(connect).json("GET", "/x")


def test_an_engines_refusal_text_is_for_the_log_only(peer):
    client = peer(b"HTTP/1.1 500 X\r\nContent-Length: 14\r\n\r\n/models/secret")
    with pytest.raises(EngineFailed) as caught:
        client.ok("POST", "/v1/completions")
    failure = start_failed(caught.value)
    assert "/models/secret" in str(caught.value) and "/models/secret" in failure.detail
    assert "/models/secret" not in failure.message and "answered 500" in failure.message
