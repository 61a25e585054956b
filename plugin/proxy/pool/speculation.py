"""Hand replicas under check to speculative requests: they run beside the check, and their answers wait for it.

A restored replica repeats a recorded generation before it serves (its check). Only a restored replica has one, and only
generations may be speculative (`plugin.proxy.retry_rules`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from plugin.proxy.pool.replica import Replica
from plugin.proxy.pool.waiting import Waiter
from plugin.runtime.phases import Phase

# Speculative requests per replica under check: one keeps the check short, and its latency is the one that users notice.
_PER_REPLICA = 1


def note_check(replica: Replica, phase: Phase, loop: asyncio.AbstractEventLoop) -> None:
    """Open a replica's check when it begins, and resolve it when it ends."""
    if phase is Phase.VERIFYING:
        if replica.check is None or replica.check.done():
            replica.check = loop.create_future()
    elif replica.check is not None:
        if not replica.check.done():
            replica.check.set_result(phase is Phase.SERVING)
        if phase is Phase.SERVING:
            replica.check = None


def assign_speculatively(
    replicas: Iterable[Replica], waiters: Iterable[Waiter], hand: Callable[[Waiter, Replica], None]
) -> None:
    """Hand each replica under check to the first waiting request that may be speculative."""
    for replica in replicas:
        check = replica.check
        if check is None or check.done() or replica.upstream is None or replica.draining:
            continue
        for waiter in list(waiters):
            if replica.outstanding >= _PER_REPLICA:
                break
            if waiter.speculative and not waiter.ready.done():
                hand(waiter, replica)


async def cancel(replica: Replica) -> bool:
    """Cancel the speculative requests on a replica whose check needs the engine alone. Return True if there were any.

    No speculative request runs on it again until it serves.
    """
    check = replica.check
    if check is None or check.done() or not replica.outstanding:
        return False
    check.set_result(False)
    await replica.wait_idle()
    return True
