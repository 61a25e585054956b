"""Decide whether a request may be sent to a replica a second time.

A request is written to a replica at most once. There are three exceptions; in each of them no byte of an answer has
reached the client:

1. The connection could not be made, or closed before the head was written: the replica never had the request
   (`forwarding.open_connection`).
2. The request was speculative and the replica did not pass its check: its answer is dropped
   (`forwarding.send_speculatively`).
3. The owner killed the replica because pages will not come (the page server failed), or because it was silent
   (`may_resend`).

In the last two the engine may have run the request already. So only a generation is sent again, which leaves no state in
an engine, and only a complete one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.exchange import Exchange
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.replica import Replica

GENERATIONS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/generate",
        "/v1/embeddings",
        "/v2/embed",
        "/encode",
        "/pooling",
        "/classify",
        "/v1/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    }
)
"""Paths whose requests leave no state in an engine."""


def may_be_speculative(request: Request, exchange: Exchange) -> bool:
    """Return True if a replica under check may answer already; the request is sent again if the check fails."""
    return request.complete and exchange.early is None and request.path in GENERATIONS


def is_repeatable(request: Request, exchange: Exchange) -> bool:
    """Return True if a request can be sent again once its replica was killed."""
    return request.http11 and may_be_speculative(request, exchange)


def is_cautious(request: Request, exchange: Exchange, replica: Replica) -> bool:
    """Return True if the answer is withheld until its body begins, because the replica may be killed for missing pages."""
    return replica.pages_pending() and is_repeatable(request, exchange)


def keeps_body(request: Request, exchange: Exchange, replica: Replica) -> bool:
    """Return True if the request's body is kept after it was sent, so that it can be sent again."""
    return exchange.cautious or (replica.killed_when_silent and is_repeatable(request, exchange))


def needs_whole_body(request: Request, replica: Replica, limit: int) -> bool:
    """Return True if the whole body must be here before it is sent: only a complete one can be sent again.

    `limit`: bytes of a body that is kept where the replica may only turn silent.
    """
    if request.path not in GENERATIONS:
        return False
    small = request.length is not None and request.length <= limit
    return replica.pages_pending() or (replica.killed_when_silent and small)


def may_resend(exchange: Exchange, replica: Replica, client: Client) -> bool:
    """Return True if a request whose replica failed is sent again: its owner killed the replica, and nothing was answered."""
    return not exchange.head_sent and bool(replica.kill_reason()) and not client.is_disconnected()
