"""Ask an endpoint whether it is ready: its readiness path, and one generated token.

An engine that answers either with 401 or 403 wants a key. Waiting does not help there, so it is an error at once.
"""

from __future__ import annotations

import json

from plugin.proxy.endpoints.request import fetch
from plugin.proxy.errors import StartFailed, UpstreamFault
from plugin.proxy.http.address import Upstream

_REFUSALS = (401, 403)
PATH_LIMIT_S = 2.0


async def path_fault(upstream: Upstream, path: str, key: str | None) -> str | None:
    """Return None if the readiness path answers 200, else the reason. Raises StartFailed (api-key-refused).

    The key is sent only where the path wants one: the health pages of vLLM and SGLang want none.
    """
    try:
        status, _ = await fetch(upstream, "GET", path, limit_s=PATH_LIMIT_S)
        if status in _REFUSALS and key is not None:
            status, _ = await fetch(upstream, "GET", path, limit_s=PATH_LIMIT_S, token=key)
    except UpstreamFault as exc:
        return exc.message
    except OSError as exc:
        return f"refused ({type(exc).__name__})"
    if status in _REFUSALS:
        raise _refused(path, status, key)
    return None if status == 200 else f"{path} answers {status}"


async def generation_fault(upstream: Upstream, model: str, key: str | None, limit_s: float) -> str | None:
    """Return None if one token was generated within `limit_s` seconds, else the reason. Raises StartFailed (api-key-refused)."""
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 1, "temperature": 0}).encode()
    try:
        status, answer = await fetch(upstream, "POST", "/v1/completions", body, limit_s=limit_s, token=key)
    except (UpstreamFault, OSError) as exc:
        return f"{exc}" or type(exc).__name__
    if status in _REFUSALS:
        raise _refused("/v1/completions", status, key)
    return None if status == 200 else f"{status} {answer[:200].decode('utf-8', 'replace')}"


def _refused(path: str, status: int, key: str | None) -> StartFailed:
    what = "without a key" if key is None else "with the key that was given"
    remedy = "give the engine's key with --api-key or QUICKTHAW_API_KEY (in the file of --config: api_key)"
    return StartFailed(
        "api-key-refused",
        f"the engine answers the readiness check {what} with {status}; {remedy}",
        detail=f"the engine answers {path} {what} with {status}; {remedy}",
    )


def pause_s(waited_s: float) -> float:
    """Return the pause between two checks of an endpoint that is not ready: a twentieth of the time waited (0.02 to 0.5 s).

    The delay of noticing readiness is then small compared with the start.
    """
    return min(0.5, max(0.02, waited_s / 20))
