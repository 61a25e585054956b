"""The address of a replica: how to get a connecting socket over TCP, on a UNIX path, or in another network namespace.

`connect()` never blocks: the socket it returns is non-blocking and its connect has been started.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl

Connect = Callable[[], socket.socket]
_CLONE_NEWNET = 0x40000000
# EAGAIN is not included: on a UNIX socket it means that the backlog is full and no connect was started.
_IN_PROGRESS = (0, errno.EINPROGRESS)


@dataclass(frozen=True)
class Upstream:
    """One upstream address. `connect` returns a new non-blocking socket whose connect is started or done, or raises OSError.

    `authority`, if set, replaces the Host header (an endpoint with virtual hosts); `tls` wraps the connection. `spec`
    is the address as plain data, for a worker process that connects by itself; None when only `connect` can reach it.
    """

    connect: Connect
    name: str
    authority: bytes | None = None
    tls: ssl.SSLContext | None = None
    server_hostname: str | None = None
    spec: dict[str, str | int] | None = None
    name_to_resolve: tuple[str, int] | None = None
    """(host, port) instead of a working `connect` when the host is a name. Resolving may take seconds, so it must not run on the loop."""


def _start(sock: socket.socket, address: object) -> socket.socket:
    sock.setblocking(False)
    try:
        code = sock.connect_ex(address)  # type: ignore[arg-type]
    except OSError:
        sock.close()
        raise
    if code not in _IN_PROGRESS:
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock


def _tcp_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def tcp(host: str, port: int, **more: object) -> Upstream:
    """Return an upstream at `host:port`. A name, unlike an address, is resolved for each connection, off the loop."""
    family = _family(host)
    spec: dict[str, str | int] = {"kind": "tcp", "host": host, "port": port}
    if family is None:
        return Upstream(_unresolved, f"{host}:{port}", spec=spec, name_to_resolve=(host, port), **more)  # type: ignore[arg-type]
    kind = family

    def connect() -> socket.socket:
        return _start(_tcp_socket(kind), (host, port))

    return Upstream(connect, f"{host}:{port}", spec=spec, **more)  # type: ignore[arg-type]


def _family(host: str) -> socket.AddressFamily | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family
    return None


def _unresolved() -> socket.socket:
    raise OSError(errno.EDESTADDRREQ, "a name must be resolved first")


def start_at(family: int, address: object) -> socket.socket:
    """Start to connect a TCP socket to a resolved address and return it. Raises OSError."""
    return _start(_tcp_socket(family), address)


def unix(path: str | os.PathLike[str]) -> Upstream:
    """Return an upstream at a UNIX socket path."""
    text = os.fspath(path)
    return Upstream(
        lambda: _start(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), text),
        f"unix:{text}",
        authority=b"localhost",
        spec={"kind": "unix", "path": text},
    )


def in_netns(netns: str, host: str, port: int) -> Upstream:
    """Return an upstream at `host:port` in the network namespace file `netns` (`/proc/PID/ns/net`). Needs CAP_SYS_ADMIN.

    A socket stays in the namespace it was made in, so the calling thread enters the namespace only for that moment.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(fd: int) -> None:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns {netns}: {os.strerror(code)}")

    def connect() -> socket.socket:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                enter(there)
                try:
                    sock = _tcp_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
                finally:
                    enter(home)
            finally:
                os.close(there)
        finally:
            os.close(home)
        return _start(sock, (host, port))

    spec: dict[str, str | int] = {"kind": "netns", "netns": netns, "host": host, "port": port}
    return Upstream(connect, f"{netns}:{host}:{port}", authority=f"{host}:{port}".encode(), spec=spec)


def from_url(url: str) -> Upstream:
    """Return an upstream from `http://host:port`, `https://host` or `unix:/path`.

    Raises ValueError when the URL is none of these, or has a path, a query or a user.
    """
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ValueError(f"{url!r}: a UNIX upstream needs an absolute path, as in unix:/run/engine.sock")
        return unix(path)
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an upstream: give http://host:port, https://host or unix:/path")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url!r}: an upstream is a place, without path, query or user")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    authority = parts.netloc.encode()
    if parts.scheme == "http":
        return tcp(parts.hostname, port, authority=authority)
    secure = tcp(parts.hostname, port, authority=authority, tls=_trust(), server_hostname=parts.hostname)
    return replace(secure, spec={"kind": "https", "url": url})  # a worker must not use plain HTTP


@cache
def _trust() -> ssl.SSLContext:
    """Return this host's trusted certificates; reading them takes tens of milliseconds."""
    import ssl

    return ssl.create_default_context()


def from_spec(spec: dict[str, str | int]) -> Upstream:
    """Return the upstream that `spec` (an `Upstream.spec` sent to a worker process) describes."""
    kind = spec["kind"]
    if kind == "tcp":
        return tcp(str(spec["host"]), int(spec["port"]))
    if kind == "https":
        return from_url(str(spec["url"]))
    if kind == "unix":
        return unix(str(spec["path"]))
    if kind == "netns":
        return in_netns(str(spec["netns"]), str(spec["host"]), int(spec["port"]))
    raise ValueError(f"unknown kind of upstream: {kind!r}")
