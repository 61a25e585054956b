"""The proxy's errors, each with an HTTP status and a stable `code`, and their only conversion to HTTP (`render`).

 ProxyError
  ├─ ClientFault     4xx: the request cannot be served as it was sent
  ├─ Unavailable     503: no replica could take the request in time; carries Retry-After
  ├─ UpstreamFault   502/504: a replica got the request but failed, or its answer is not valid
  ├─ StartFailed     503: an owner's wake or start has finally failed, with the owner's own code
  └─ Unneeded        no answer: the work in progress is no longer needed

The response bodies are those that the OpenAI and Anthropic SDKs parse.
"""

from __future__ import annotations

import json
import math

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = _TYPES | {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
_ANTHROPIC_TYPES |= {504: "timeout_error"}


class ProxyError(Exception):
    """Base class: an HTTP `status`, a stable kebab-case `code`, a one-line message, and optional seconds before a retry."""

    def __init__(self, code: str, message: str, *, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.retry_after_s = code, message, status, retry_after_s
        self.detail = ""
        """The message plus the engine's own output: for the log and the admin endpoints, never for clients."""
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        """Header fields that belong to the status: `Allow`, `WWW-Authenticate`."""

    def fresh(self) -> ProxyError:
        """Return an equal error without a traceback: one failure may end thousands of requests, each needing its own."""
        twin: ProxyError = Exception.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.args = self.args
        return twin


class ClientFault(ProxyError):
    """The request is invalid; it is refused and no replica sees it."""

    def __init__(
        self, code: str, message: str, *, status: int = 400, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(code, message, status=status)
        self.headers = headers


class Unavailable(ProxyError):
    """No replica can serve the request now; `retry_after_s` is the measured remaining time of the start."""

    def __init__(self, code: str, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(code, message, status=503, retry_after_s=retry_after_s)


class UpstreamFault(ProxyError):
    """A replica got the request and did not answer it properly. Never retried, because it may have run."""

    def __init__(self, code: str, message: str, *, status: int = 502) -> None:
        super().__init__(code, message, status=status)


class StartFailed(ProxyError):
    """A start or wake has finally failed, including its fallback to a cold start; the owner sets the code."""

    def __init__(self, code: str, message: str, *, retry_after_s: float = 5.0, detail: str = "") -> None:
        super().__init__(code, message, status=503, retry_after_s=retry_after_s)
        self.detail = detail


def start_failed(error: Exception) -> ProxyError:
    """Convert an owner's failure, keeping its code; the engine's own output goes to `detail` only."""
    if isinstance(error, ProxyError):
        return error
    message = f"{error.args[0] if error.args else error}" or type(error).__name__
    code = getattr(error, "code", None)
    public = getattr(error, "public", message)
    return StartFailed(code if isinstance(code, str) else "start-failed", public, detail=message)


class Unneeded(ProxyError):
    """The work in progress is no longer needed; it ends without a failure."""

    CODE = "unneeded"

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE, message, status=503)


def render(error: ProxyError, path: str, request_id: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return (status, headers, body) of `error` in the shape that clients of `path` parse.

    That is Anthropic's shape on /v1/messages (`speaks_anthropic`), OpenAI's elsewhere; both carry the stable code.
    """
    body = json.dumps(document(error, path, request_id), separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), *error.headers]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    return error.status, headers, body


def speaks_anthropic(path: str) -> bool:
    """Return True if clients of `path` parse Anthropic's shape: `/v1/messages` and below, also behind an engine's `--root-path`."""
    return "/v1/messages/" in path + "/"


def document(error: ProxyError, path: str, request_id: str) -> dict[str, object]:
    """Return the JSON document of `error`, which is also the error event of an early stream."""
    if speaks_anthropic(path):
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        inner = {"type": kind, "message": error.message, "code": error.code}
        return {"type": "error", "error": inner, "request_id": request_id}
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
