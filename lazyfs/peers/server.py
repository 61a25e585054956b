"""Serve the verified chunks of this host to others: `quickthaw peer`. Read-only, over HTTP, with a token.

    GET /v1/chunks/DIGEST?file=…&index=…&start=…&length=…&encoding=…    plain bytes; 404 if nobody has them (&have=1: if it is not here)
    GET /v1/health                                                       what was served

A chunk comes out of memory, out of the cache's file, from a peer above this host in the chunk's tree (`lazyfs.peers.order`), or
from the store. It is fetched once, however many hosts ask for it at a time; meanwhile each of them gets `102 Processing` every
few milliseconds (`lazyfs.peers.heartbeat`). What the cache has is not verified again: a state byte PRESENT says that it was, and
every receiver verifies it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import socket
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lazyfs.cache.sparse_file import HEADER, PRESENT
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.manifest import RAW, ZSTD, is_digest
from lazyfs.errors import LazyfsError, NotFound
from lazyfs.logs import RepeatLimiter
from lazyfs.paths import open_fd
from lazyfs.peers.client import CLIENT, Peers, Wanted
from lazyfs.peers.heartbeat import Heartbeat
from lazyfs.stores.retry import RetryPolicy, retrying

log = logging.getLogger("lazyfs.peers.server")
# A client that reads nothing for this long is dropped; an idle connection too.
_CLIENT_S, _IDLE_S = 10.0, 60.0
# Bodies sent at a time: more only share one link. Others wait their turn, in the order in which they came.
_SENDING = 32
# Fetches at a time. Hosts wait for each other, each for those of lower rank: too few threads could wait in a circle.
_FETCHING = 256
# Connections at a time; further ones are closed at once, and their hosts ask others.
_CONNECTIONS = 4096
# Largest index and offset: those of a file of the largest size that the kernel knows, less than what pread() takes.
_MOST = 1 << 62
_POLICY = RetryPolicy(attempts=None, limit=30.0)


class Body:
    """A chunk in memory: its bytes count until the last one who keeps or sends it is done."""

    __slots__ = ("__weakref__", "data")

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data


class Chunks:
    """Where this host's server finds chunks: in memory, on disk, at the peers above it, in the store.

    `memory`: bytes of chunks in memory at most: those under way, those being sent, and those kept after a fetch for others.
    """

    def __init__(self, cache: Path, store: ChunkStore | None, memory: int, peers: Peers | None = None) -> None:
        self.cache, self.store, self.memory, self.peers = cache, store, memory, peers
        self.fetched = self.relayed = self.failed = self.refused = 0
        self.used = 0
        self._kept: OrderedDict[str, Body] = OrderedDict()
        self._fetches: dict[tuple[str, int], Future[Body]] = {}
        # Reentrant: dropping the last reference to a body, anywhere, counts it out.
        self._lock = threading.RLock()
        self._closed = False
        self._pool = ThreadPoolExecutor(_FETCHING, thread_name_prefix="store")

    def in_memory(self, digest: str) -> Body | None:
        """Return a chunk that was fetched for others."""
        with self._lock:
            body = self._kept.get(digest)
            if body is not None:
                self._kept.move_to_end(digest)
            return body

    def on_disk(self, wanted: Wanted) -> int | None:
        """Return a descriptor of the cache's file if it has the chunk; the caller closes it."""
        folder = self.cache / "images" / wanted.file[:2] / wanted.file
        try:
            with open_fd(folder / "have", os.O_RDONLY) as fd:
                if os.pread(fd, 1, HEADER.size + wanted.index) != bytes([PRESENT]):
                    return None
            found = os.open(folder / "data", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if os.fstat(found).st_size < wanted.start + wanted.length:
            os.close(found)
            return None
        return found

    def fetch(self, wanted: Wanted) -> Future[Body] | None:
        """Return the fetch of a chunk from a peer or the store, begun by the first caller, or a done one of a kept chunk; None without
        a store, or without memory for it.

        Who finds no memory asks another peer, and at last the store: waiting for it, hosts could wait for each other in a circle.
        """
        with self._lock:
            if self.store is None or self._closed:
                return None
            # With its length: one who asks for a wrong one fails alone.
            key = (wanted.digest, wanted.length)
            future = self._fetches.get(key)
            if future is None and (kept := self.in_memory(wanted.digest)) is not None:
                future = Future()  # its fetch has ended since the caller looked
                future.set_result(kept)
            elif future is None:
                if not self._reserve(wanted.length):
                    self.refused += 1
                    return None
                future = self._fetches[key] = self._pool.submit(self._fetch, wanted)
                future.add_done_callback(lambda done: self._release(wanted.length) if done.cancelled() else None)
        return future

    def _fetch(self, wanted: Wanted) -> Body:
        try:
            buffer: bytes | bytearray | None = None
            if self.peers is not None:
                buffer = bytearray(wanted.length)
                if self.peers.get(wanted, memoryview(buffer), relay=True) is None:
                    buffer = None
            relayed = buffer is not None
            data = buffer if buffer is not None else retrying(lambda: self._get(wanted), _POLICY)
            body = Body(data)
        except BaseException:
            with self._lock:
                self.failed += 1
                self.used -= wanted.length
                self._fetches.pop((wanted.digest, wanted.length), None)
            raise
        weakref.finalize(body, self._release, wanted.length).atexit = False
        with self._lock:
            # At once: whoever asks finds it under way or kept.
            self._fetches.pop((wanted.digest, wanted.length), None)
            if relayed:
                self.relayed += wanted.length
            else:
                self.fetched += wanted.length
            self._kept[wanted.digest] = body
            self._kept.move_to_end(wanted.digest)
        return body

    def _get(self, wanted: Wanted) -> bytes:
        if self._closed or self.store is None:
            raise NotFound("this peer is ending")
        return self.store.get(wanted.digest, wanted.length, wanted.encoding)

    def _reserve(self, length: int) -> bool:
        """Count a chunk in, if it finds room once kept ones are dropped."""
        while self.used + length > self.memory and self._kept:
            # One that is being sent stays in memory until then.
            self._kept.popitem(last=False)
        if self.used + length > self.memory:
            return False
        self.used += length
        return True

    def _release(self, length: int) -> None:
        with self._lock:
            self.used -= length

    def close(self) -> None:
        """Drop fetches that have not begun, and wait for the others: at most for one request to the store."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._kept.clear()
        close = getattr(self.store.store, "close", None) if self.store is not None else None
        if close is not None:
            close()
        if self.peers is not None:
            self.peers.close()


class PeerServer:
    """A running server. `address` is where it listens."""

    def __init__(self, listen: tuple[str, int], token: str, chunks: Chunks) -> None:
        self.chunks = chunks
        self.token = token.strip()
        self.served = self.served_chunks = 0
        self.sending = _Turns(_SENDING)
        self.repeats = RepeatLimiter(log)
        peer = self

        class Handler(_Handler):
            server_of = peer

        kind = type("Server", (_Server,), {"address_family": socket.AF_INET6 if ":" in listen[0] else socket.AF_INET})
        self._server: ThreadingHTTPServer = kind(listen, Handler)
        self.address: tuple[str, int] = self._server.server_address[:2]
        self.heartbeat = Heartbeat()  # its thread runs: not before the address is ours
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="peer", daemon=True)

    def start(self) -> None:
        """Serve in threads."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and end."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self.chunks.close()
        self.heartbeat.close()

    def counters(self) -> dict[str, int]:
        """Return bytes served and fetched, and chunks served."""
        return {
            "served_bytes": self.served,
            "served_chunks": self.served_chunks,
            "fetched_bytes": self.chunks.fetched,
            "relayed_bytes": self.chunks.relayed,
            "failed_fetches": self.chunks.failed,
            "refused_fetches": self.chunks.refused,
            "memory_bytes": self.chunks.used,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    block_on_close = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(*arguments, **named)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Each connection has a thread, also of those who have not shown a token yet.
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            # A client that gave up a request, or whose host is gone.
            log.debug("the connection of %s ended: %s", client_address[0], sys.exc_info()[1])
            return
        log.exception("defect while serving %s", client_address[0])


class _Turns:
    """At most `most` holders at a time, in the order of their arrival."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._waiting: OrderedDict[object, threading.Event] = OrderedDict()
        self._lock = threading.Lock()

    def enter(self) -> threading.Event:
        """Return an event that is set once it is the caller's turn, which `leave` ends."""
        event = threading.Event()
        with self._lock:
            if self._held < self._most and not self._waiting:
                self._held += 1
                event.set()
            else:
                self._waiting[event] = event
        return event

    def leave(self, event: threading.Event) -> None:
        """End a turn, or the wait for one."""
        with self._lock:
            if self._waiting.pop(event, None) is not None:
                return
            if self._waiting:
                self._waiting.popitem(last=False)[1].set()
            else:
                self._held -= 1


class _Gone(Exception):
    """The client closed its connection or reads nothing."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "quickthaw-peer"
    sys_version = ""
    timeout = _IDLE_S
    disable_nagle_algorithm = True
    server_of: PeerServer

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def do_GET(self) -> None:
        peer = self.server_of
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if peer.token and not hmac.compare_digest(given.encode("latin-1"), peer.token.encode()):
            self._refuse(HTTPStatus.UNAUTHORIZED)
            return
        parts = urlsplit(self.path)
        if parts.path == "/v1/health":
            self._body(HTTPStatus.OK, json.dumps(peer.counters()).encode())
            return
        try:
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            digest, file = parts.path.removeprefix("/v1/chunks/"), query["file"]
            index, start, length = (int(query[name]) for name in ("index", "start", "length"))
            encoding = int(query["encoding"])
            good = (
                is_digest(digest)
                and is_digest(file)
                and 0 <= index < _MOST
                and 0 <= start < _MOST
                and 0 < length <= MAX_CHUNK
            )
            if not good or encoding not in (RAW, ZSTD):
                raise ValueError(self.path)
        except (KeyError, ValueError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        with contextlib.suppress(_Gone):
            self._chunk(Wanted(digest, length, encoding, file, index, start), may_fetch="have" not in query)

    def _chunk(self, wanted: Wanted, *, may_fetch: bool) -> None:
        chunks, turns = self.server_of.chunks, self.server_of.sending
        body, length = chunks.in_memory(wanted.digest), wanted.length
        fd = chunks.on_disk(wanted) if body is None else None
        if body is None and fd is None:
            body = self._fetched(wanted, may_fetch)
            if body is None:
                return
        if body is not None and len(body.data) != length:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        turn = turns.enter()
        try:
            if not turn.is_set():
                with self._heartbeat():
                    turn.wait()
            self.connection.settimeout(_CLIENT_S)
            self._head(HTTPStatus.OK, length)
            if body is not None:
                self._send(body.data)
            elif fd is not None:
                self._send_file(fd, wanted.start, length)
            self.server_of.served += length
            self.server_of.served_chunks += 1
        finally:
            turns.leave(turn)
            self.connection.settimeout(_IDLE_S)
            if fd is not None:
                os.close(fd)

    def _fetched(self, wanted: Wanted, may_fetch: bool) -> Body | None:
        """Wait for a chunk from elsewhere, telling the client that it is on its way; None once it was refused."""
        future = self.server_of.chunks.fetch(wanted) if may_fetch else None
        if future is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        try:
            with self._heartbeat():
                return future.result()
        except (NotFound, CancelledError):
            self._refuse(HTTPStatus.NOT_FOUND)
        except (LazyfsError, OSError) as error:
            text = f"chunk {wanted.digest[:12]} from the store: {error}"
            self.server_of.repeats.log(logging.WARNING, "store", text)
            self._refuse(HTTPStatus.BAD_GATEWAY)
        return None

    def _heartbeat(self) -> contextlib.AbstractContextManager[None]:
        client = self.headers.get(CLIENT) or f"{self.client_address}"
        return self.server_of.heartbeat.during(client, self.connection)

    def _head(self, status: HTTPStatus, length: int) -> None:
        self._send(f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {length}\r\n\r\n".encode())

    def _send(self, data: bytes | bytearray) -> None:
        try:
            self.connection.sendall(data)
        except OSError as error:
            self.close_connection = True
            raise _Gone from error

    def _send_file(self, fd: int, start: int, length: int) -> None:
        try:
            with open(fd, "rb", buffering=0, closefd=False) as file:
                sent = self.connection.sendfile(file, start, length)
        except OSError as error:
            self.close_connection = True
            raise _Gone from error
        if sent != length:
            self.close_connection = True
            raise _Gone

    def _body(self, status: HTTPStatus, data: bytes) -> None:
        with contextlib.suppress(_Gone):
            self._head(status, len(data))
            self._send(data)

    def _refuse(self, status: HTTPStatus) -> None:
        self._body(status, b"")
