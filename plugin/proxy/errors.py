"""What can go wrong in the proxy, by kind, each with an HTTP status and a stable `code`, and the one place that turns
it into bytes.

ProxyError
 ├─ ClientFault     4xx: the request cannot be served as it was sent
 ├─ Unavailable     503: no replica could take the request in time; carries Retry-After
 ├─ UpstreamFault   502/504: a replica had the request, or could not be understood
 ├─ StartFailed     503: an owner's wake or start has finally failed, with the owner's own code
 └─ Unneeded        no answer: nobody waits any more for what was being done

Raises nothing itself. `render` is the only conversion to HTTP; the shapes are those that the OpenAI and Anthropic
SDKs parse.
"""

from __future__ import annotations

import json
import math

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = _TYPES | {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
_ANTHROPIC_TYPES |= {504: "timeout_error"}


class ProxyError(Exception):
    """The base: `status`, a stable kebab-case `code`, a message of one line, and seconds to wait before a retry, if
    any.
    """

    def __init__(self, code: str, message: str, *, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.retry_after_s = code, message, status, retry_after_s
        self.detail = ""
        """The same with what an engine wrote: for the log and the admin pages, never for clients."""
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        """Header fields that belong to the status: `Allow`, `WWW-Authenticate`."""

    def fresh(self) -> ProxyError:
        """An equal error without a traceback: one failure may end thousands of requests, each with its own."""
        twin: ProxyError = Exception.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.args = self.args
        return twin


class ClientFault(ProxyError):
    """The request itself is at fault: it is refused, and no replica sees it."""

    def __init__(
        self, code: str, message: str, *, status: int = 400, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(code, message, status=status)
        self.headers = headers


class Unavailable(ProxyError):
    """Nothing can serve the request now; `retry_after_s` is what is left of the start, from measured history."""

    def __init__(self, code: str, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(code, message, status=503, retry_after_s=retry_after_s)


class UpstreamFault(ProxyError):
    """A replica had the request and did not answer it properly. Never retried: it may have run."""

    def __init__(self, code: str, message: str, *, status: int = 502) -> None:
        super().__init__(code, message, status=status)


class StartFailed(ProxyError):
    """A start or a wake has finally failed (its cold fallback included); raised or reported by the owner with its
    own code.
    """

    def __init__(self, code: str, message: str, *, retry_after_s: float = 5.0, detail: str = "") -> None:
        super().__init__(code, message, status=503, retry_after_s=retry_after_s)
        self.detail = detail


def start_failed(error: Exception) -> ProxyError:
    """An owner's failure as an error with its own code; what its engine wrote stays in `detail`."""
    if isinstance(error, ProxyError):
        return error
    message = f"{error.args[0] if error.args else error}" or type(error).__name__
    code = getattr(error, "code", None)
    public = getattr(error, "public", message)
    return StartFailed(code if isinstance(code, str) else "start-failed", public, detail=message)


class Unneeded(ProxyError):
    """Nobody waits any more for what was being done; it ends without a failure."""

    CODE = "unneeded"

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE, message, status=503)


def render(error: ProxyError, path: str, request_id: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return (status, headers, body) of `error` in the shape that clients of `path` parse.

    Anthropic's shape on /v1/messages (`speaks_anthropic`), OpenAI's everywhere else; both carry the stable code.
    """
    body = json.dumps(document(error, path, request_id), separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), *error.headers]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    return error.status, headers, body


def speaks_anthropic(path: str) -> bool:
    """Whether clients of `path` parse Anthropic's shape: `/v1/messages` and below, also behind an engine's `--root-path`."""
    return "/v1/messages/" in path + "/"


def document(error: ProxyError, path: str, request_id: str) -> dict[str, object]:
    """The JSON document of `error`: also what an early-started stream carries as its error event."""
    if speaks_anthropic(path):
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        inner = {"type": kind, "message": error.message, "code": error.code}
        return {"type": "error", "error": inner, "request_id": request_id}
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
