"""How a proxy behaves: one frozen object, checked where it is made. Times are seconds, sizes are bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from plugin.proxy.http.path_rules import check_denied

Denied = Callable[[str], bool]


@dataclass(frozen=True)
class Settings:
    """Every knob of one proxy. A value out of range is refused with the field's name."""

    own_prefix: str = "/-"
    """Where the proxy's own pages live; never forwarded, whatever the spelling."""
    admin_token: str | None = None
    """When set, the own pages (but for `ready` and `live`) ask for `Authorization: Bearer …` or `?token=`. Otherwise they answer
    clients of this host only, unless they have a port of their own.
    """
    own_on_main: bool = True
    """False when the own pages are bound to another port: then the main port answers 404 for them."""
    denied_paths: frozenset[str] = frozenset()
    """Paths of the engine that must not be reached from outside, and everything below them."""
    root_path: str = ""
    """A prefix that the engine takes off a path before it matches: denied paths are denied behind it too."""
    max_clients: int | None = None
    """Client connections at once; None: as many as the limit on open files allows, with a connection to a replica for
    each.
    """
    max_held: int = 4096
    max_held_bytes: int = 256 << 20
    hold_timeout_s: float | None = None
    """Deadline of a held request; None computes it from the measured starts. A client's header can lower it."""
    max_hold_s: float = 3600.0
    early_stream: bool = False
    early_comment_every_s: float = 1.0
    body_buffer: int = 64 << 10
    """Bytes of one request body kept before the client is paused."""
    early_body_buffer: int = 1 << 20
    """Bytes of one held body kept to see whether it asks for a stream (early-stream only)."""
    write_buffer: int = 64 << 10
    max_head: int = 64 << 10
    max_headers: int = 200
    head_timeout_s: float = 20.0
    keepalive_s: float = 75.0
    body_timeout_s: float = 300.0
    """A client that sends no byte of its body, or takes no byte of its answer, for this long is dropped."""
    body_total_s: float = 900.0
    """A client that takes longer than this to send one body is answered 408; the time that it waits for us does not count."""
    tunnel_idle_s: float = 3600.0
    """A WebSocket over which nothing passes for this long is closed."""
    upstream_keepalive_s: float = 3.0
    """Shorter than the engines' own (uvicorn: 5 s), so that a kept connection is not one that is being closed."""
    upstream_timeout_s: float = 3600.0
    """A replica that sends no byte for this long is answered for with 504; `math.inf`: never. An answer that is not streamed sends
    nothing until it is complete.
    """
    connect_timeout_s: float = 5.0
    max_connecting: int = 64
    max_idle_connections: int = 256
    trust_forwarded: bool = False
    """Keep the client's own X-Forwarded-* (a trusted proxy stands in front); otherwise they are replaced."""
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
        if not self.own_prefix.startswith("/") or len(self.own_prefix) < 2 or self.own_prefix.endswith("/"):
            raise ValueError(
                f"own_prefix must start with a slash, name a folder and not end in a slash: {self.own_prefix!r}"
            )
        for path in self.denied_paths:
            check_denied(path)
