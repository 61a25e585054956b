"""Control access to the admin endpoints: status, metrics and the page for people.

They show commands, addresses and an engine's last output, so by default only clients of this host may read them. With a
token, every client needs it, including those of this host: as a bearer token, or once in the page's sign-in form, which
begins a session (`Sessions`). On a port of their own (`--admin-listen`), any client of that port may read them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from plugin.proxy.errors import ClientFault
from plugin.proxy.http.request import Request

if TYPE_CHECKING:
    from plugin.proxy.settings import Settings

SESSION_S = 12 * 3600
COOKIE = b"quickthaw_session"
_TRIES, _TRIES_IN_S, _PEERS = 10, 60.0, 4096
_ASK = ((b"www-authenticate", b'Bearer realm="quickthaw"'),)
# Headers that reverse proxies add. A direct client of this host sends none of them.
_FORWARDED = frozenset(
    {b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip", b"x-cluster-client-ip"}
)


class Sessions:
    """Check the admin token, and the sessions that sign-ins with it have begun.

    A session is a cookie signed with `Settings.session_key`, valid for `SESSION_S` seconds in every worker. An address
    that sent `_TRIES` wrong tokens within `_TRIES_IN_S` seconds is refused until fewer of them are that recent.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.admin_token is not None
        self._token, self._key = settings.admin_token.encode(), settings.session_key.encode()
        self._path = settings.admin_prefix.encode()
        self._wrong: dict[bytes, list[float]] = {}
        self._ended: dict[str, float] = {}
        self.announce: Callable[[str], None] = lambda session: None
        """Called with a session that has been signed out, for other workers."""

    def check(self, request: Request, peer: bytes) -> None:
        """Return if the request has the bearer token or a valid session. Raises ClientFault: 401 or 429."""
        for lower, _, value in request.headers:
            scheme, _, given = value.partition(b" ")
            if lower == b"authorization" and scheme.lower() == b"bearer":
                self.check_token(given.strip(), peer)
                return
        if not self._valid(_session_of(request)):
            message = "this page needs the admin token: send Authorization: Bearer TOKEN, or sign in with a browser"
            raise ClientFault("admin-token", message, status=401, headers=_ASK)

    def check_token(self, given: bytes, peer: bytes) -> None:
        """Return if `given` is the token, compared in constant time. Raises ClientFault: 401 (admin-token), 429 (admin-throttled)."""
        now = time.monotonic()
        wrong = [at for at in self._wrong.pop(peer, ()) if now - at < _TRIES_IN_S]
        if len(wrong) < _TRIES:
            if hmac.compare_digest(_digest(given), _digest(self._token)):
                return
            wrong.append(now)
        while len(self._wrong) >= _PEERS:
            self._wrong.pop(next(iter(self._wrong)))
        self._wrong[peer] = wrong
        if len(wrong) < _TRIES:
            raise ClientFault("admin-token", "this is not the admin token", status=401, headers=_ASK)
        left = math.ceil(wrong[0] + _TRIES_IN_S - now)
        message = f"too many wrong tokens came from this address; try again in {left} s"
        raise ClientFault("admin-throttled", message, status=429, headers=((b"retry-after", b"%d" % left),))

    def begin(self, request: Request) -> bytes:
        """Return the Set-Cookie header of a new session."""
        body = f"{int(time.time()) + SESSION_S}.{os.urandom(16).hex()}"
        return self._cookie(request, f"{body}.{self._sign(body)}".encode(), SESSION_S)

    def sign_out(self, request: Request) -> bytes:
        """End the request's session in every worker and return the Set-Cookie header that removes its cookie."""
        session = _session_of(request)
        if self._valid(session):
            self.end(session)
            self.announce(session)
        return self._cookie(request, b"", 0)

    def end(self, session: str) -> None:
        """Refuse a session from now on."""
        now = time.time()
        self._ended = {ended: until for ended, until in self._ended.items() if until > now}
        self._ended[session] = now + SESSION_S

    def _valid(self, session: str) -> bool:
        body, _, signature = session.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(body).encode()):
            return False
        return int(body.partition(".")[0]) > time.time() and session not in self._ended

    def _sign(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()

    def _cookie(self, request: Request, value: bytes, age_s: int) -> bytes:
        # A reverse proxy that terminates TLS says so; the browser then keeps the cookie off plain connections.
        encrypted = b"https" in (request.scheme, request.header(b"x-forwarded-proto"))
        secure = b"; Secure" if encrypted else b""
        path = request.mount + self._path
        return b"%b=%b; Path=%b; Max-Age=%d; HttpOnly; SameSite=Strict%b" % (COOKIE, value, path, age_s, secure)


def check_access(sessions: Sessions | None, request: Request, peer: bytes, *, on_admin_port: bool) -> None:
    """Return if the client may use the restricted endpoints. Raises ClientFault: 401, 403 or 429."""
    if sessions is not None:
        sessions.check(request, peer)
    elif not on_admin_port:
        check_local(request, peer)


def check_local(request: Request, peer: bytes) -> None:
    """Return if the client is of this host. Raises ClientFault (admin-local-only)."""
    if not is_local(request, peer):
        message = "without --admin-token or --admin-listen this page answers clients of its own host only"
        raise ClientFault("admin-local-only", message, status=403)


def is_local(request: Request, peer: bytes) -> bool:
    """Return True if the request comes from this host: over loopback, for a loopback name, and not through a reverse proxy.

    The name is checked because a web page can make a local browser request its own name at 127.0.0.1 (DNS rebinding). A
    UNIX socket does not count: usually a reverse proxy connects there.
    """
    if not _is_loopback(peer.decode("ascii", "replace")):
        return False
    if any(lower in _FORWARDED or lower.startswith(b"x-forwarded") for lower, _, _ in request.headers):
        return False
    host = request.host.decode("ascii", "replace").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or _is_loopback(name)


def _is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _digest(text: bytes) -> bytes:
    """Hash a token, because `compare_digest` would show the length of a longer one."""
    return hashlib.sha256(text).digest()


def _session_of(request: Request) -> str:
    for lower, _, value in request.headers:
        if lower == b"cookie":
            for part in value.split(b";"):
                name, _, session = part.strip().partition(b"=")
                if name == COOKIE:
                    return session.decode("ascii", "replace")
    return ""
