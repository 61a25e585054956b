"""A read-only store over plain HTTP(S) range requests: a static file server, or a CDN in front of a bucket.

Uses http.client with one kept-alive connection per thread: four times as fast as the usual client libraries for 8 MiB
ranges. Credentials come from the URL, from $QUICKTHAW_HTTP_TOKEN (bearer token), or from ~/.netrc as with curl, in this
order.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import http.client
import io
import netrc
import os
import socket
import string
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from lazyfs.errors import LazyfsError, NotFound, Permanent, Temporary
from lazyfs.stores.base import MOST_BYTES, ObjectInfo, too_large
from lazyfs.stores.urls import shown_url

INACTIVITY_S, WHOLE_S = 10.0, 60.0
_REDIRECTS = 5
_BLOCK = 1 << 20
_COPY = 65536


def open_url(url: str) -> WebStore:
    """Return the store of an http:// or https:// URL."""
    return WebStore(url)


class WebStore:
    """Objects below a URL. `whole_s` limits one request, `inactivity_s` the silence within it (seconds)."""

    remote = True

    def __init__(self, url: str, *, inactivity_s: float = INACTIVITY_S, whole_s: float = WHOLE_S) -> None:
        parts = urlsplit(url)
        self.base = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        self.url = shown_url(self.base)
        self.inactivity_s = inactivity_s
        self.whole_s = whole_s
        self._headers = {"User-Agent": "quickthaw", "Accept-Encoding": "identity", **_authorization(url)}
        self._local = threading.local()
        self._all: list[http.client.HTTPConnection] = []

    def get(
        self,
        key: str,
        start: int = 0,
        length: int | None = None,
        version: str = "",
        into: memoryview | None = None,
        *,
        limit: int = MOST_BYTES,
    ) -> bytes | memoryview:
        if length == 0:
            return b""
        return self._read(key, start, length, version, into, limit if length is None else length)

    def _read(
        self, key: str, start: int, length: int | None, version: str, into: memoryview | None, limit: int
    ) -> bytes | memoryview:
        """Do what `get` does, for a length other than 0. `limit`: the most bytes to accept."""
        headers = {}
        if start or length is not None:
            headers["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        if version:
            headers["If-Match"] = version
        status, answer, body = self._request("GET", key, headers, into, limit)
        if status == 416:
            return b""
        etag = answer.get("ETag", "")
        if version and etag and etag != version:
            raise Permanent(f"{self.url}/{key} was replaced; mount it again", code="source-changed")
        if status == 200 and (start or length is not None):
            # The server ignored the range.
            return body[start : None if length is None else start + length]
        if status == 206 and not answer.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise Temporary(f"{self.url}/{key}: the server sent another range than requested")
        return body if length is None else body[:length]

    def head(self, key: str) -> ObjectInfo | None:
        try:
            _, answer, _ = self._request("HEAD", key, {}, None, 0)
        except NotFound:
            return None
        modified = email.utils.parsedate_tz(answer.get("Last-Modified", ""))
        when = email.utils.mktime_tz(modified) if modified else time.time()
        return ObjectInfo(key, int(answer.get("Content-Length", "0")), when, answer.get("ETag", ""))

    def put(self, key: str, data: bytes | memoryview) -> None:
        raise self._read_only()

    def create(self, key: str, data: bytes) -> bool:
        raise self._read_only()

    def touch(self, key: str) -> None:
        raise self._read_only()

    def delete(self, key: str) -> None:
        raise self._read_only()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        raise Permanent(
            f"{self.url}: an HTTP store cannot be listed; give the store behind it, or of one object its whole digest",
            code="no-listing",
        )

    def flush(self) -> None:
        return

    def _read_only(self) -> LazyfsError:
        return Permanent(f"{self.url} is read-only; import into a directory or a bucket", code="read-only-store")

    def _request(
        self, method: str, key: str, headers: dict[str, str], into: memoryview | None, limit: int
    ) -> tuple[int, http.client.HTTPMessage, bytes | memoryview]:
        """Send a request for an object. Return status, headers and body."""
        return self._follow(method, f"{self.base}/{quote(key)}", headers, into, limit)[:3]

    def _follow(
        self, method: str, url: str, headers: dict[str, str], into: memoryview | None, limit: int
    ) -> tuple[int, http.client.HTTPMessage, bytes | memoryview, str]:
        """Send a request, following redirects. Return status, headers, body, and the URL that answered."""
        deadline = time.monotonic() + self.whole_s
        for _ in range(_REDIRECTS):
            try:
                status, answer, body = self._send(method, url, headers, deadline, into, limit)
            except (OSError, http.client.HTTPException) as error:
                self._close_connection(url)
                raise Temporary(f"{shown_url(url)}: {error or type(error).__name__}") from error
            except LazyfsError:
                # Close the connection: the rest of the body would be parsed as the next response.
                self._close_connection(url)
                raise
            if status in (301, 302, 303, 307, 308):
                url = self._redirected(url, answer.get("Location", ""))
                continue
            if status in (200, 206, 416):
                return status, answer, body, url
            raise self._status_error(status, shown_url(url), answer)
        raise Permanent(f"{shown_url(url)}: too many redirects")

    @staticmethod
    def _redirected(url: str, location: str) -> str:
        """Return the target URL of a redirect.

        Raises Permanent (bad-redirect) for a target that is not HTTP(S), or a change from https to http.
        """
        try:
            # Other letters come as they are from some servers; a request line cannot have them.
            there = quote(urljoin(url, location), encoding="latin-1", safe=string.punctuation)
            place = origin(there)
        except ValueError:
            place = ("", "", 0)
        if place[0] not in ("http", "https") or not place[1]:
            raise Permanent(f"{shown_url(url)}: redirects to a target that is not an HTTP URL", code="bad-redirect")
        if origin(url)[0] == "https" and place[0] == "http":
            raise Permanent(
                f"{shown_url(url)}: redirects to {shown_url(there)}, which is not encrypted; give that URL to use it",
                code="bad-redirect",
            )
        return there

    def _send(
        self, method: str, url: str, headers: dict[str, str], deadline: float, into: memoryview | None, limit: int
    ) -> tuple[int, http.client.HTTPMessage, bytes | memoryview]:
        parts = urlsplit(url)
        connection = self._connection(url)
        if connection.sock is not None:
            connection.sock.settimeout(self.inactivity_s)
        sent = {**self._headers, **headers}
        if origin(url) != origin(self.base):
            # Send credentials only to the scheme, host and port that they are for.
            sent.pop("Authorization", None)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target or "/", headers=sent)
        response = response_within(connection, deadline, self.inactivity_s)
        body: bytes | memoryview = b""
        used = method == "HEAD" or response.status in (200, 206)
        if method != "HEAD" and used:
            if response.status == 200 and "Range" in headers:
                # The server ignores the range and sends the whole object.
                limit = MOST_BYTES
            body = self._body(response, into, limit, shown_url(url))
        elif not used and response.length is not None and response.length <= _COPY:
            response.read()
            used = True
        response.close()
        if response.will_close or not used:
            # Do not read a long error page to its end.
            self._close_connection(url)
        return response.status, response.headers, body

    def _body(
        self, response: http.client.HTTPResponse, into: memoryview | None, limit: int, url: str
    ) -> bytes | memoryview:
        length = response.length
        if length is not None and length > limit:
            raise too_large(url, limit)
        if length is None:
            parts, got = [], 0
            while piece := response.read1(_BLOCK):
                parts.append(piece)
                got += len(piece)
                if got > limit:
                    raise too_large(url, limit)
            return b"".join(parts)
        view = memoryview(bytearray(length)) if into is None or len(into) < length else into[:length]
        got = 0
        while got < length:
            n = response.readinto(view[got : got + _BLOCK])
            if not n:
                raise http.client.IncompleteRead(bytes(view[:got]), length - got)
            got += n
        return view if length >= _COPY else bytes(view)

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        kept: dict[tuple[str, str], http.client.HTTPConnection] = self._local.__dict__.setdefault("kept", {})
        place = (parts.scheme, parts.netloc)
        if place not in kept:
            kept[place] = connect(url, self.inactivity_s)
            self._all.append(kept[place])
        return kept[place]

    def _close_connection(self, url: str) -> None:
        parts = urlsplit(url)
        connection = self._local.__dict__.get("kept", {}).pop((parts.scheme, parts.netloc), None)
        if connection is not None:
            connection.close()
            with contextlib.suppress(ValueError):
                self._all.remove(connection)

    def close(self) -> None:
        """Close the connections of all threads; the store opens new ones if it is used again."""
        while self._all:
            self._all.pop().close()

    def _status_error(self, status: int, url: str, answer: http.client.HTTPMessage) -> LazyfsError:
        text = f"{url}: HTTP {status}"
        if status in (404, 410):
            return NotFound(text)
        if status == 412:
            return Permanent(f"{text}; the file was replaced, mount it again", code="source-changed")
        if status in (401, 403):
            return Permanent(f"{text}; check the credentials", code="permission-denied")
        if status in (408, 425, 429) or status >= 500:
            after = answer.get("Retry-After", "")
            wait = float(after) if after.isdecimal() else None
            return Temporary(text, code="throttled" if status in (429, 503) else "temporary", retry_after=wait)
        return Permanent(text, code="refused")


def connect(url: str, inactivity_s: float) -> http.client.HTTPConnection:
    """Return a connection, not open yet, to the host of a URL. `inactivity_s` limits each wait for the socket."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=inactivity_s)


def response_within(
    connection: http.client.HTTPConnection, deadline: float, inactivity_s: float
) -> http.client.HTTPResponse:
    """Return the response to the request just sent. It must be complete at `deadline` (of time.monotonic()).

    Raises TimeoutError, as its reads do.
    """
    connection.response_class = functools.partial(_DeadlineResponse, deadline=deadline, inactivity_s=inactivity_s)  # type: ignore[assignment]
    return connection.getresponse()


class _DeadlineResponse(http.client.HTTPResponse):
    """An HTTP response that must be complete at `deadline`, however slowly its head or body arrives.

    Raises TimeoutError.
    """

    def __init__(
        self, sock: socket.socket, *arguments: Any, deadline: float, inactivity_s: float, **named: Any
    ) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock, deadline, inactivity_s))


class _DeadlineReader(io.RawIOBase):
    """Raw reads from a socket; each read may take the time left until the deadline."""

    def __init__(self, sock: socket.socket, deadline: float, inactivity_s: float) -> None:
        self._sock, self._deadline, self._inactivity_s = sock, deadline, inactivity_s
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("not complete in time")
        self._sock.settimeout(min(self._inactivity_s, left))
        try:
            return self._raw.readinto(buffer)
        except TimeoutError:
            silent = f"silent for {self._inactivity_s:g} s"
            raise TimeoutError("not complete in time" if left < self._inactivity_s else silent) from None

    def close(self) -> None:
        self._raw.close()
        super().close()


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port, which credentials are bound to.

    Raises ValueError for an invalid port.
    """
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def _authorization(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
    token = os.environ.get("QUICKTHAW_HTTP_TOKEN")
    if token:
        return {"Authorization": f"Bearer {token}"}
    try:
        found = netrc.netrc().authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        found = None
    if found:
        return {"Authorization": "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()}
    return {}
