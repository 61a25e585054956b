"""Track LoRA adapters that clients load into a running engine. No snapshot or start contains them, so the engine must stay awake."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from plugin.proxy.http.path_rules import canonical

if TYPE_CHECKING:
    from plugin.proxy.http.exchange import Exchange
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.replica import Replica

log = logging.getLogger("quickthaw.proxy")


def changed_by(request: Request) -> bool:
    """Return True if a request loads or unloads an adapter, on either engine (`/v1/load_lora_adapter`, …)."""
    target = request.target.lower()
    if request.method != b"POST" or not (b"lora_adapter" in target or b"%" in target):
        return False
    return "load_lora_adapter" in canonical(target).rpartition("/")[2]


@contextlib.contextmanager
def watched(pool: ReplicaPool, replica: Replica, request: Request, exchange: Exchange) -> Iterator[None]:
    """Wrap the forwarding of a request: if it changes the engine's adapters and the engine accepts it, keep the engine awake."""
    if replica.adapters_loaded or not changed_by(request):
        yield
        return
    replica.adapters_loaded = True
    try:
        yield
    finally:
        if exchange.status >= 400:
            replica.adapters_loaded = False
        else:  # loaded, or unknown because the client left early
            say(pool, replica)


def note(pool: ReplicaPool, replica: Replica) -> None:
    """Keep a replica awake from now on, because another process saw an adapter change."""
    if not replica.adapters_loaded:
        replica.adapters_loaded = True
        say(pool, replica)


def say(pool: ReplicaPool, replica: Replica) -> None:
    """Log that a replica is kept awake, if the pool has an idle timeout."""
    if pool.idle_timeout_s is not None:
        fields = {"pool": pool.name, "replica": replica.name}
        text = "%s: adapters-loaded: LoRA adapters were loaded while it serves, and a start would not have them; it is not put to sleep"
        log.warning(text, replica.name, extra={"event": "adapters-loaded", "fields": fields})
