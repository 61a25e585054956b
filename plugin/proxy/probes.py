"""Answer requests that wake no engine while no engine serves, and remember what engines answer to them.

Monitoring asks for health, metrics and the list of models every few seconds, and browsers and scanners ask for paths
that no engine has. None of these wakes an engine or counts as its use (`path_rules.Verdict.QUIET`). While no engine
serves, the proxy answers: health by what a request sent now would meet, the other probes by what the engine answered
last, and the rest with an error. Each of these answers carries `Quickthaw-State`.

An answer is kept under a salted digest of the request's credentials. A client with other credentials, or without any, gets
from memory only a successful answer that the engine gave to a client without credentials.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from plugin.proxy.errors import ProxyError, Unavailable
from plugin.proxy.http.path_rules import HEALTH, PROBES, PathRules
from plugin.proxy.pool.replica import STARTING
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from plugin.proxy.http import wire
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.settings import Settings

REMEMBERED, NOT_AWAKE = "remembered", "engine-asleep"
"""Outcomes of requests that are answered here: from memory, and with an error because the engine is not awake."""
STATE = b"quickthaw-state"
_ANSWERS, _BYTES, _TARGET = 32, 256 << 10, 256
"""How many answers of one pool are kept, how large each may be, and the longest target that has one."""
_CREDENTIAL_WORDS = (b"auth", b"key", b"token", b"secret", b"cookie", b"session", b"user", b"jwt", b"signature")
_NO_CREDENTIALS = frozenset({b"user-agent", b"sec-fetch-user"})
"""Headers that hold one of these words and authorise nothing; nearly every client sends the first."""
_READING = (b"GET", b"HEAD")


class Host(Protocol):
    """The part of the server (`server.Proxy`) that answers here need."""

    settings: Settings
    rules: PathRules
    buffered: int


@dataclass(frozen=True, slots=True)
class Seen:
    """An engine's answer as it was seen last."""

    status: int
    content_type: bytes
    body: bytes
    at: float = field(default_factory=time.monotonic)


class Memory:
    """The answers of one pool to probes, at most 32 of at most 256 KiB."""

    def __init__(self) -> None:
        self._salt = os.urandom(16)
        self._answers: OrderedDict[tuple[bytes, bytes], Seen] = OrderedDict()

    def digest(self, request: Request) -> bytes:
        """Return a salted digest of the headers that may authorise the request, or b"" if it has none."""
        found = [
            (lower, value)
            for lower, _, value in request.headers
            if lower not in _NO_CREDENTIALS and any(word in lower for word in _CREDENTIAL_WORDS)
        ]
        if not found:
            return b""
        from hashlib import blake2b  # takes milliseconds, which no restore's first request should pay

        return blake2b(repr(found).encode(), key=self._salt).digest()

    def keep(self, request: Request, seen: Seen) -> None:
        """Remember an answer, in place of the one that was asked for least recently when there are too many."""
        key = target, digest = request.target, self.digest(request)
        self._answers.pop(key, None)  # what a key got before it was revoked, too
        if digest and (seen.status >= 300 or self._public(target) is not None):
            return  # neither random keys nor one that nobody needs may displace what others see
        self._answers[key] = seen
        while len(self._answers) > _ANSWERS:
            self._answers.popitem(last=False)

    def find(self, request: Request) -> Seen | None:
        """Return what the engine answered last to this request with these credentials, or successfully to one without any."""
        key = (request.target, self.digest(request))
        seen = self._answers.get(key)
        if seen is None:
            return self._public(request.target)
        self._answers.move_to_end(key)
        return seen

    def _public(self, target: bytes) -> Seen | None:
        seen = self._answers.get((target, b""))
        return seen if seen is not None and seen.status < 300 else None


class Probe:
    """One request that does not count as use. Its exchange reports the engine's answer, which may be kept."""

    def __init__(self, memory: Memory, request: Request, path: str) -> None:
        """`path`: as the engine matches it (`PathRules.engine_path`)."""
        self._memory, self._request, self._path = memory, request, path
        self._status = 0
        self._type = b""
        self._body: bytearray | None = None

    def head(self, status: int, headers: list[wire.Field]) -> None:
        """Note the head of an answer; collect its body if the answer may be kept."""
        known = self._path in PROBES
        fields = {lower: value for lower, _, value in headers}
        kept = (
            self._request.method == b"GET"
            and len(self._request.target) <= _TARGET
            and b"?" not in self._request.target
            and (200 <= status < 300 or (known and 400 <= status < 500))
            and (known or self._path.startswith("/v1/models/"))
            and not fields.keys() & {b"content-encoding", b"set-cookie"}
            and not any(word in fields.get(b"cache-control", b"").lower() for word in (b"no-store", b"private"))
        )
        self._status, self._type = status, fields.get(b"content-type", b"")
        self._body = bytearray() if kept else None

    def data(self, data: bytes) -> None:
        """Collect a part of the body."""
        if self._body is not None:
            self._body += data
            if len(self._body) > _BYTES:
                self._body = None

    def end(self) -> None:
        """Keep the complete answer."""
        if self._body is not None:
            self._memory.keep(self._request, Seen(self._status, self._type, bytes(self._body)))

    def answer(self, host: Host, pool: ReplicaPool) -> tuple[int, list[tuple[bytes, bytes]], bytes, str]:
        """Return status, headers, body and outcome of the answer that is given while no engine serves.

        Raises ProxyError: a request sent now would be refused, or the path has no answer here (engine-asleep).
        """
        state = state_of(pool)
        request, headers = self._request, [(b"cache-control", b"no-store"), (STATE, state.encode())]
        health = self._path in HEALTH and request.method in (*_READING, b"POST")
        if health and (refusal := _refusal(host, pool)) is not None:
            refusal.headers += ((STATE, state.encode()),)
            raise refusal
        seen = self._memory.find(request) if request.method in _READING else None
        if seen is not None:
            headers.append((b"age", b"%d" % (time.monotonic() - seen.at)))
            if seen.content_type:
                headers.append((b"content-type", seen.content_type))
            return seen.status, headers, seen.body, REMEMBERED
        if health:
            headers.append((b"content-type", b"application/json"))
            return 200, headers, b'{"status":"%b"}' % state.encode(), REMEMBERED
        if self._path in PROBES or self._path.startswith("/v1/models/"):
            text, status = f"the engine is {state}, and what it last answered here is not known", 503
        else:
            text, status = f"the engine is {state}, and a request to this path does not wake it (--wake-on)", 404
            if request.method not in (*_READING, b"OPTIONS"):
                status = 503
        error = ProxyError(NOT_AWAKE, text, status=status)
        error.headers = ((STATE, state.encode()),)
        raise error


def announces_use(request: Request) -> bool:
    """Return True unless the request is an OPTIONS that no browser sends ahead of a request of its own (a CORS preflight)."""
    return request.method != b"OPTIONS" or bool(request.header(b"access-control-request-method"))


def should_wait(pool: ReplicaPool) -> bool:
    """Return True while an owner starts the pool's first replica: a probe then waits, as for any engine that loads."""
    replicas = pool.replicas.values()
    if not all(replica.first_start for replica in replicas):
        return False
    return pool.waker.hook is None or any(replica.tracker.phase in STARTING for replica in replicas)


def state_of(pool: ReplicaPool) -> str:
    """Return the state of a pool that cannot answer now, in a word: `waking`, or its replicas' phase, such as `asleep`."""
    phases = {replica.tracker.phase for replica in pool.replicas.values()}
    if phases & STARTING:
        return "waking"
    if Phase.SERVING in phases:
        return "busy"  # it is going to sleep, its snapshot is taken, or it refuses connections
    return str(next(iter(sorted(phases)), Phase.IDLE))


def _refusal(host: Host, pool: ReplicaPool) -> ProxyError | None:
    """Return the error that a request sent now would get, or None if it would be held or answered (`/-/ready`)."""
    if (refusal := pool.waker.refusal()) is not None:
        return refusal
    if not pool.accepts() or host.buffered > host.settings.max_held_bytes:
        return Unavailable("held-too-many", "as many requests as may wait are waiting", retry_after_s=pool.left_s())
    return None
