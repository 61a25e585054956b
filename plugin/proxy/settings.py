"""The settings of a proxy: one frozen object, validated when it is made. Times are seconds, sizes are bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from plugin.proxy.http.path_rules import check_denied, check_wake_on

Denied = Callable[[str], bool]


@dataclass(frozen=True)
class Settings:
    """All settings of one proxy. Raises ValueError naming the field when a value is out of range."""

    admin_prefix: str = "/-"
    """Path prefix of the admin endpoints; never forwarded, in any spelling."""
    admin_token: str | None = None
    """If set, the admin endpoints (except `ready` and `live`) require `Authorization: Bearer …`, or a session of a browser
    that signed in with it. Otherwise they answer clients of this host only, unless they have a port of their own.
    """
    session_key: str = field(default_factory=lambda: os.urandom(32).hex(), repr=False)
    """Signs the sessions of browsers. All workers share it; a new proxy makes a new one, which ends all sessions."""
    admin_on_public_port: bool = True
    """False when the admin endpoints have a port of their own; the main port then answers 404 for them."""
    denied_paths: frozenset[str] = frozenset()
    """Engine paths that are not reachable through the proxy, including everything below them."""
    allowed_paths: frozenset[str] = frozenset()
    """Exceptions from `denied_paths`, including everything below them."""
    root_path: str = ""
    """A prefix that the engine strips before it matches a path; denied paths are denied behind it too."""
    wake_on: frozenset[str] = frozenset({"/"})
    """Engine paths (with everything below them) and globs whose requests wake an engine and count as its use. Probes
    (`path_rules.PROBES`) do neither, unless named themselves. `quickthaw` sets `plugin.options.WAKE_ON`.
    """
    max_clients: int | None = None
    """Maximum client connections; None allows as many as the limit on open files, with one connection to a replica for each."""
    max_held: int = 4096
    max_held_bytes: int = 256 << 20
    hold_timeout_s: float | None = None
    """Deadline of a held request; None computes it from the measured starts. A client's header can lower it."""
    max_hold_s: float = 3600.0
    early_stream: bool = False
    early_comment_every_s: float = 1.0
    body_buffer: int = 64 << 10
    """Bytes of one request body that are buffered before the client is paused."""
    early_body_buffer: int = 1 << 20
    """Bytes of one held body that are buffered to see whether it asks for a stream (early-stream only)."""
    write_buffer: int = 64 << 10
    max_head: int = 64 << 10
    max_headers: int = 200
    head_timeout_s: float = 20.0
    keepalive_s: float = 75.0
    body_timeout_s: float = 300.0
    """A client that sends no byte of its body, or reads no byte of its answer, for this long is dropped."""
    body_total_s: float = 900.0
    """A client that takes longer than this to send one body gets a 408; time in which the proxy pauses it does not count."""
    tunnel_idle_s: float = 3600.0
    """An idle WebSocket is closed after this long."""
    upstream_keepalive_s: float = 3.0
    """Shorter than the engines' own timeout (uvicorn: 5 s), so that the engine is not closing a connection that is reused."""
    upstream_timeout_s: float = 3600.0
    """A replica that sends no byte for this long causes a 504; `math.inf` disables it. An answer that is not streamed
    sends nothing until it is complete.
    """
    connect_timeout_s: float = 5.0
    max_connecting: int = 64
    trust_forwarded: bool = False
    """Keep the client's X-Forwarded-* headers (behind a trusted proxy); otherwise they are replaced."""
    access_log: bool = False
    drain_s: float = 30.0
    backlog: int = 4096

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
                raise ValueError(f"{item.name} must not be negative, it is {value}")
        if self.admin_token == "":
            raise ValueError("admin_token must not be empty")
        if not self.admin_prefix.startswith("/") or len(self.admin_prefix) < 2 or self.admin_prefix.endswith("/"):
            raise ValueError(
                f"admin_prefix must start with a slash, name a folder and not end in a slash: {self.admin_prefix!r}"
            )
        for path in (*self.denied_paths, *self.allowed_paths):
            check_denied(path)
        for path in self.wake_on:
            check_wake_on(path)
