"""Ask peers for a chunk, before the store.

A peer that has to fetch the chunk itself sends `102 Processing` while it does, over any connection of this client, so silence
means that it is busy or gone. After 50 ms of silence the next peer is asked whether it has the chunk. A peer that has never
failed then gets a second in all, because a chunk that a second peer fetches leaves the store twice; any other is given up
at once. One that failed is left out for a while, one that sent wrong bytes for ten minutes.
"""

from __future__ import annotations

import logging
import secrets
import select
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

from lazyfs.content.chunk_store import digest_of
from lazyfs.content.manifest import File
from lazyfs.logs import RepeatLimiter
from lazyfs.peers.order import Address, Members, sources

log = logging.getLogger("lazyfs.peers.client")
# Names the process that asks: a server tells it once that it lives, not for each of its requests.
CLIENT = "Quickthaw-Client"
SILENCE_S = 0.05
GRACE_S = 1.0
# How long a peer that answers may take before its first byte, and at least how fast a body must come.
_PATIENCE_S, _SLOWEST = 10.0, 4 << 20
# How long a peer is left out after a failure, doubling, and after wrong bytes.
_COOL_S, _COOL_MOST_S, _BANNED_S = 0.5, 30.0, 600.0
_IDLE = 64
_HEAD = 16 << 10


class Silent(Exception):
    """The peer sent nothing in time."""


@dataclass(frozen=True)
class Wanted:
    """A chunk, and where a peer's cache may have it: in the file of this digest, as chunk `index`, from byte `start` on."""

    digest: str
    length: int
    encoding: int
    file: str
    index: int
    start: int

    @classmethod
    def of(cls, file: File, index: int) -> Self:
        """Return the chunk of a manifest's file."""
        chunk = file.chunks[index]
        return cls(chunk.digest, chunk.length, chunk.encoding, file.digest, index, file.offsets[index])

    @property
    def path(self) -> str:
        """Return the path of a request for it."""
        return (
            f"/v1/chunks/{self.digest}?file={self.file}&index={self.index}&start={self.start}"
            f"&length={self.length}&encoding={self.encoding}"
        )


@dataclass
class _State:
    """`failures`: how often in a row the peer was left out, `since`: when it was last."""

    failures: int = 0
    since: float = 0.0
    out_until: float = 0.0
    lied: bool = False


class Peers:
    """The peers of this host. Safe to use from many threads. `limit_s`: for one chunk from all of them, seconds."""

    def __init__(self, members: Members, token: str, *, silence_s: float = SILENCE_S, limit_s: float = 20.0) -> None:
        self.members, self.silence_s, self.limit_s = members, silence_s, limit_s
        self.repeats = RepeatLimiter(log)
        self._headers = f"{CLIENT}: {secrets.token_hex(8)}\r\n"
        self._headers += f"Authorization: Bearer {token.strip()}\r\n" if token else ""
        self._heard: dict[Address, float] = {}
        self._idle: OrderedDict[tuple[Address, int], socket.socket] = OrderedDict()
        self._states: dict[Address, _State] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(self, wanted: Wanted, into: memoryview, *, relay: bool = False) -> memoryview | None:
        """Return a chunk's verified plain bytes in `into`, or None if no peer gave them.

        This host's own server is asked first, which asks others; `relay`: the caller is that server.
        """
        deadline = time.monotonic() + self.limit_s
        view = into[: wanted.length]
        candidates = self._candidates(wanted.digest, relay)
        for number, peer in enumerate(candidates):
            if time.monotonic() > deadline:
                return None
            others = candidates[number + 1 :]
            if self._from(peer, wanted.path, view, wanted.digest, others):
                return view
        return None

    def _from(self, peer: Address, path: str, view: memoryview, digest: str, others: list[Address]) -> bool:
        """Return whether the chunk is in `view` now: from the peer, or from the next one if that has it and this is silent."""
        exchange: _Exchange | None = None
        try:
            exchange = self._begin(peer, path)
            try:
                there = exchange.receive(view, self.silence_s)
            except Silent:
                if self._has_failed(peer) or exchange.began_body:
                    raise
                if others and self._only_if_there(others[0], path, view, digest):
                    return True
                there = exchange.receive(view, max(self.silence_s, GRACE_S - self.silence_s))
            if there and digest_of(view) != digest:
                self._failed(peer, "it sent wrong bytes", lied=True)
                return False
            self._works(peer)
            self._keep(exchange)
            exchange = None
            return there
        except (Silent, OSError, ValueError) as error:
            self._failed(peer, f"{error or type(error).__name__}")
            return False
        finally:
            if exchange is not None:
                exchange.close()

    def _only_if_there(self, peer: Address, path: str, view: memoryview, digest: str) -> bool:
        """Ask a peer for a chunk that it need not fetch; its silence is no failure, since nobody depends on it."""
        try:
            exchange = self._begin(peer, f"{path}&have=1")
        except (Silent, OSError):
            return False
        try:
            there = exchange.receive(view, self.silence_s)
            self._keep(exchange)
            if there and digest_of(view) != digest:
                self._failed(peer, "it sent wrong bytes", lied=True)
                return False
            return there
        except (Silent, OSError, ValueError):
            exchange.close()
            return False

    def close(self) -> None:
        """Close all connections and stop the look-ups."""
        self.members.close()
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.popitem()[1].close()

    def _candidates(self, digest: str, relay: bool) -> list[Address]:
        now, me = time.monotonic(), self.members.me
        with self._lock:
            left_out = {peer for peer, state in self._states.items() if state.out_until > now}
        peers = [peer for peer in self.members.now if peer not in left_out or peer == me]
        own = [me] if me is not None and not relay and me not in left_out else []
        return own + sources(digest, peers, me, serves=relay)

    def _failed(self, peer: Address, why: str, *, lied: bool = False) -> None:
        now = time.monotonic()
        with self._lock:
            state = self._states.setdefault(peer, _State())
            if not lied and state.out_until > now:
                return  # one pause of a peer fails whatever is under way from it, and is one failure
            state.failures, state.since, state.lied = state.failures + 1, now, state.lied or lied
            out_s = _BANNED_S if lied else min(_COOL_MOST_S, _COOL_S * 2 ** min(10, state.failures - 1))
            state.out_until = max(state.out_until, now + out_s)
            for key in [key for key in self._idle if key[0] == peer]:
                self._idle.pop(key).close()
        self.repeats.log(logging.WARNING, f"{peer}", f"peer {peer}: {why}; left out for {out_s:g} s")

    def _works(self, peer: Address) -> None:
        with self._lock:
            state = self._states.get(peer)
            # Right bytes in another thread do not undo wrong ones.
            if state is not None and not (state.lied and state.out_until > time.monotonic()):
                del self._states[peer]

    def _has_failed(self, peer: Address) -> bool:
        """Return whether a peer failed and has sent nothing since: one that is only slow gets its time again."""
        with self._lock:
            state = self._states.get(peer)
            return state is not None and (state.lied or self._heard.get(peer, 0.0) <= state.since)

    # -- connections

    def _begin(self, peer: Address, path: str) -> _Exchange:
        """Send a request, over a kept connection if there is one. Raises OSError."""
        request = f"GET {path} HTTP/1.1\r\nHost: {peer}\r\n{self._headers}\r\n".encode()
        while (kept := self._take(peer)) is not None:
            # A connection that can be read has been closed by the peer. (Not select(): it knows no descriptor above 1023.)
            readable = select.poll()
            readable.register(kept, select.POLLIN)
            if not readable.poll(0):
                exchange = _Exchange(peer, kept, self._heard)
                try:
                    exchange.send(request, self.silence_s)
                    return exchange
                except OSError:
                    exchange.close()
            else:
                kept.close()
        place = self.members.place(peer)
        if place is None:
            raise OSError("its name has no address")
        connection = socket.create_connection((place, peer.port), timeout=self.silence_s)
        exchange = _Exchange(peer, connection, self._heard)
        try:
            exchange.send(request, self.silence_s)
        except BaseException:
            exchange.close()
            raise
        return exchange

    def _take(self, peer: Address) -> socket.socket | None:
        with self._lock:
            key = next((key for key in reversed(self._idle) if key[0] == peer), None)
            return None if key is None else self._idle.pop(key)

    def _keep(self, exchange: _Exchange) -> None:
        if not exchange.reusable:
            exchange.close()
            return
        with self._lock:
            if self._closed:
                exchange.close()
                return
            self._idle[exchange.peer, exchange.connection.fileno()] = exchange.connection
            while len(self._idle) > _IDLE:
                self._idle.popitem(last=False)[1].close()


class _Exchange:
    """One request over one connection, and what has come of its answer. `heard`: when each peer last sent something, to any of them."""

    def __init__(self, peer: Address, connection: socket.socket, heard: dict[Address, float]) -> None:
        self.peer, self.connection, self._heard = peer, connection, heard
        self.began_body = self.reusable = False
        self._buffer = bytearray()

    def send(self, request: bytes, silence_s: float) -> None:
        """Send the request. Raises OSError."""
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.settimeout(silence_s)
        self.connection.sendall(request)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def receive(self, view: memoryview, silence_s: float) -> bool:
        """Receive the chunk into `view`; return False if the peer does not have it. May be called again after Silent.

        Raises Silent, OSError, or ValueError for an answer that is none.
        """
        self.connection.settimeout(silence_s)
        status, length = self._head()
        if status != HTTPStatus.OK:
            if status not in (HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.BAD_GATEWAY):
                raise ValueError(f"it answers {status}; check --peer-token")
            self.reusable = length == len(self._buffer) == 0
            return False
        rest = self._buffer
        if length != len(view) or len(rest) > length:
            raise ValueError(f"it sends {length} bytes instead of {len(view)}")
        self.began_body = True
        got, deadline = len(rest), time.monotonic() + 2.0 + length / _SLOWEST
        view[:got] = rest
        # It is alive: what it has begun to send may take a little longer on a busy host.
        self.connection.settimeout(max(silence_s, GRACE_S))
        while got < length:
            got += self._receive(view[got:], deadline, "it sends too slowly")
        self.reusable = True
        return True

    def _head(self) -> tuple[int, int]:
        """Return status and length of the body; interim answers are skipped, and what follows stays in the buffer."""
        deadline, block = time.monotonic() + _PATIENCE_S, memoryview(bytearray(4096))
        while True:
            while (end := self._buffer.find(b"\r\n\r\n")) < 0:
                n = self._receive(block, deadline, f"it took more than {_PATIENCE_S:g} s")
                self._buffer += block[:n]
                if len(self._buffer) > _HEAD:
                    raise ValueError("its answer is not HTTP")
            lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            del self._buffer[: end + 4]
            words = lines[0].split(" ", 2)
            if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
                raise ValueError("its answer is not HTTP")
            if int(words[1]) >= HTTPStatus.OK:
                pairs = (line.partition(":") for line in lines[1:])
                headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
                return int(words[1]), int(headers.get("content-length", "0"))

    def _receive(self, view: memoryview, deadline: float, too_late: str) -> int:
        """Receive some bytes, waiting while the peer sends something to anybody here. Raises Silent, OSError."""
        silence_s = self.connection.gettimeout() or 0.0
        while True:
            try:
                n = self.connection.recv_into(view)
            except TimeoutError as error:
                now = time.monotonic()
                if now > deadline:
                    self.began_body = True  # it has had its time
                    raise Silent(too_late) from error
                if now - self._heard.get(self.peer, -silence_s) >= silence_s:
                    raise Silent(f"silent for {silence_s * 1000:.0f} ms") from error
                continue
            if not n:
                raise ConnectionResetError("it closed the connection")
            self._heard[self.peer] = now = time.monotonic()
            if now > deadline:
                self.began_body = True
                raise Silent(too_late)
            return n
