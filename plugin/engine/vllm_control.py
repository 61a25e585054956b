"""Let the launcher control a vLLM server without developer mode: one path, accessible only with a key that changes with each call.

vLLM's own control endpoints need VLLM_SERVER_DEV_MODE, which opens them to every client. This ASGI middleware
(`--middleware quickthaw_engine.vllm_control.ControlMiddleware`) opens none of them. It serves the launcher's calls and
passes everything else on unchanged: without the key, the path answers what vLLM answers to any unknown path.

The key is a file `key` (0600) in the folder QUICKTHAW_CONTROL_DIR. The launcher writes a new key for each call and
removes it afterwards (launchers/control.py). Between calls, and in every snapshot, there is no key and no access.
"""

import hmac
import json
import os

PATH = "/quickthaw-control"
HEADER = b"x-quickthaw-key"
KEY_BYTES = 32
MAX_BODY = 1 << 16
WORKER_METHODS = frozenset(
    {
        "quickthaw_drop_cache",
        "quickthaw_trim",
        "quickthaw_name_weights",
        "quickthaw_reload_weights",
        "quickthaw_return_memory",
        "reload_weights",
    }
)


class ControlMiddleware:
    """Serve the launcher's control calls; pass everything else through."""

    def __init__(self, app):
        self.app = app

    def __call__(self, scope, receive, send):
        """Handle an ASGI call. Returns the inner application's awaitable, so that a request costs one comparison and no task."""
        if scope.get("path") == PATH and scope["type"] == "http" and authorised(scope["headers"]):
            return _serve(scope, receive, send)
        return self.app(scope, receive, send)


def authorised(headers):
    """Return True if the request carries the key that the launcher has written for this call."""
    given = [value for name, value in headers if name == HEADER]
    folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
    if len(given) != 1 or not folder:
        return False
    try:
        with open(os.path.join(folder, "key"), "rb") as file:
            key = file.read(1024)
    except OSError:
        return False
    return len(key) >= KEY_BYTES and hmac.compare_digest(given[0], key)


async def call(client, asked):
    """Execute one control call on vLLM's engine client. Raises ValueError for an unknown call."""
    name = asked.get("call")
    if name == "reset_prefix_cache":
        return await client.reset_prefix_cache()
    if name == "collective_rpc" and asked.get("method") in WORKER_METHODS:
        await client.collective_rpc(asked["method"], timeout=asked.get("timeout"))
        return None
    if name == "sleep":
        await client.sleep(level=int(asked["level"]))
        return None
    if name == "wake_up":
        await client.wake_up(tags=[str(tag) for tag in asked["tags"]])
        return None
    raise ValueError(f"no control call {name!r}")


async def _serve(scope, receive, send):
    body = b""
    more = True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    try:
        answer, status = {"result": await call(scope["app"].state.engine_client, json.loads(body))}, 200
    except Exception as error:  # noqa: BLE001 - the launcher reports whatever the engine raises
        answer, status = {"error": f"{type(error).__name__}: {error}"}, 500
    data = json.dumps(answer, default=str).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
