"""Move the engine of a `quickthaw restore` that this proxy has started, through its admin endpoints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from plugin.proxy.endpoints.request import fetch
from plugin.proxy.errors import StartFailed, UpstreamFault

if TYPE_CHECKING:
    from plugin.proxy.http.address import Upstream

STANDBY_LIMIT_S = 60.0
"""Seconds that an engine may take to standby; on a GPU its state moves to host memory."""


async def move(upstream: Upstream, token: str | None, action: str, limit_s: float) -> None:
    """Have its engine wake, go to standby, or end (`sleep`), and return when that is done.

    Raises StartFailed: the code with which it refused, or `restore-silent` if it did not answer within `limit_s` seconds.
    """
    try:
        status, body = await fetch(upstream, "POST", f"/-/models/default/{action}", limit_s=limit_s, token=token)
    except (OSError, UpstreamFault) as error:
        why = f"quickthaw restore did not answer: {error or type(error).__name__}"
        raise StartFailed("restore-silent", why) from error
    if status != 200:
        try:
            refusal = json.loads(body)["error"]
            code, why = str(refusal["code"]), str(refusal["message"])
        except (ValueError, LookupError, TypeError):
            code, why = "restore-refused", f"quickthaw restore answered {status}"
        raise StartFailed(code, why)
