"""Track LoRA adapters that clients load into a running engine. No snapshot or start contains them, so the engine must stay awake."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from plugin.proxy.http.path_rules import canonical

if TYPE_CHECKING:
    from plugin.proxy.http.exchange import Exchange
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.replica import Replica

SETTLE_LIMIT_S = 30.0
log = logging.getLogger("quickthaw.proxy")


def changes_adapters(request: Request) -> bool:
    """Return True if a request loads or unloads an adapter, on either engine (`/v1/load_lora_adapter`, …)."""
    target = request.target.lower()
    if request.method != b"POST" or not (b"lora_adapter" in target or b"%" in target):
        return False
    return "load_lora_adapter" in canonical(target).rpartition("/")[2]


async def wait_for_answer(request: Request, exchange: Exchange) -> None:
    """Wait for the engine's answer after the client of such a request has disconnected: only the answer shows whether it was accepted.

    Otherwise any client could keep an engine awake for ever, and other models asleep, with a refused request.
    """
    limit = time.monotonic() + SETTLE_LIMIT_S
    while not exchange.status and request.complete and time.monotonic() < limit:
        if exchange.connection is None or not exchange.connection.alive():
            return
        await asyncio.sleep(0.02)


async def forward_and_note(
    forwarding: Awaitable[bool], pool: ReplicaPool, replica: Replica, request: Request, exchange: Exchange
) -> bool:
    """Await the forwarding of a request that changes the engine's adapters. If the engine accepts it, keep the engine awake."""
    generation = replica.generation
    try:
        return await forwarding
    except asyncio.CancelledError:
        if not pool.closed:
            await wait_for_answer(request, exchange)
        raise
    finally:
        # Without a status it may have been accepted, unless the engine never had the whole request.
        if exchange.status < 400 and request.complete and replica.generation == generation:
            mark_loaded(pool, replica)


def mark_loaded(pool: ReplicaPool, replica: Replica) -> None:
    """Keep a replica awake from now on, because clients have loaded adapters; log it if the pool would go to sleep when idle."""
    if not replica.adapters_loaded and pool.sleep_after_s is not None:
        fields = {"pool": pool.name, "replica": replica.name}
        text = "%s: adapters-loaded: clients have loaded LoRA adapters, which no start restores; it stays awake"
        log.warning(text, replica.name, extra={"event": "adapters-loaded", "fields": fields})
    replica.adapters_loaded = True
