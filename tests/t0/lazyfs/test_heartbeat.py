"""A server that lives is heard by each client that waits, over one of its connections, whatever the others do."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import pytest

from lazyfs.content.chunk_store import digest_of
from lazyfs.peers.client import GRACE_S, Peers, Wanted
from lazyfs.peers.heartbeat import Heartbeat
from lazyfs.peers.order import Members
from lazyfs.peers.server import Chunks, PeerServer

pytestmark = pytest.mark.t0
MESSAGE = b"HTTP/1.1 102 Processing\r\n\r\n"
LIMIT_S = 10.0


@pytest.fixture
def heartbeat():
    found = Heartbeat()
    yield found
    found.close()


@pytest.fixture
def pair():
    """Return a function that makes a server's connection, which never blocks for long, and its client's end."""
    with contextlib.ExitStack() as stack:

        def make():
            ends = socket.socketpair()
            for end in ends:
                stack.enter_context(end)
                end.settimeout(LIMIT_S)
            return ends

        yield make


def waiting(socket_):
    """Return the bytes that are there already."""
    with contextlib.suppress(BlockingIOError):
        return os.read(socket_.fileno(), 1 << 16)  # recv() would wait for the socket's timeout
    return b""


def test_it_is_sent_within_and_not_afterwards(heartbeat, pair):
    server, client = pair()
    with heartbeat.during("a", server):
        assert client.recv(len(MESSAGE), socket.MSG_WAITALL) == MESSAGE
    while waiting(client):
        pass
    time.sleep(0.1)
    assert not waiting(client) and not heartbeat._waiting


def test_a_client_is_told_once_and_in_turns_however_many_of_its_requests_wait(heartbeat, pair):
    pairs = [pair() for _ in range(8)]
    heartbeat.close()
    time.sleep(0.1)
    with contextlib.ExitStack() as stack:
        for server, _ in pairs:
            stack.enter_context(heartbeat.during("a", server))
        for _ in range(2):
            for _, next_one in pairs:
                heartbeat._tell("a")
                assert [client for _, client in pairs if waiting(client)] == [next_one]


def test_a_client_that_reads_nothing_or_is_gone_stops_no_other(heartbeat, pair):
    full, gone, heard = pair(), pair(), pair()
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full[0].fileno(), bytes(1 << 16))
    gone[1].close()
    with heartbeat.during("full", full[0]), heartbeat.during("gone", gone[0]), heartbeat.during("heard", heard[0]):
        for _ in range(3):
            assert heard[1].recv(len(MESSAGE), socket.MSG_WAITALL) == MESSAGE
        assert "gone" not in heartbeat._waiting


@pytest.mark.slow
def test_a_host_waits_for_a_peer_that_fetches_for_longer_than_silence_may_last(tmp_path):
    go = threading.Event()

    class Slow:
        def get(self, digest, length, encoding):
            assert go.wait(30)
            return bytes(length)

    store = Slow()
    store.store = None
    server = PeerServer(("127.0.0.1", 0), "", Chunks(tmp_path, store, 1 << 20))
    server.start()
    peers = Peers(Members(f"127.0.0.1:{server.address[1]}", "127.0.0.9"), "")
    threading.Timer(GRACE_S + 1.0, go.set).start()
    try:
        assert peers.get(Wanted(digest_of(bytes(40)), 40, 0, "a" * 64, 0, 0), memoryview(bytearray(40))) == bytes(40)
    finally:
        go.set()
        peers.close()
        server.close()
