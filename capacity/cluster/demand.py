"""The demand that proxies see, from their metrics: requests a second of each pool, and requests waiting or being answered.

A URL whose host has several addresses (a headless Service) is asked at each of them. Rates are averages over a window; a
counter that went back (the proxy was restarted) begins anew. Whoever does not answer makes the observation incomplete.
"""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from capacity.errors import CapacityError

ANSWER_LIMIT_S = 5.0
_MOST = 16 << 20
_TOKEN = "QUICKTHAW_ADMIN_TOKEN"
_P = "quickthaw_proxy_"


@dataclass(frozen=True)
class Seen:
    """What all proxies together see, by pool. `rates`: requests a second, None until the window has begun. `busy`: requests now."""

    rates: dict[str, float] | None
    busy: dict[str, int]


class Proxies:
    """The proxies behind some URLs of `/-/metrics`."""

    def __init__(self, urls: tuple[str, ...], window_s: float) -> None:
        self.urls, self.window_s = urls, window_s
        self._last: dict[str, tuple[dict[str, float], dict[str, int]]] = {}
        """By address: requests that had ended, and that waited or were being answered, by pool."""
        self._arrived: deque[tuple[float, dict[str, float]]] = deque()
        """When it was observed (monotonic seconds), and what had arrived since the one before."""

    def observe(self) -> Seen:
        """Ask every proxy. Raises CapacityError (demand-failed) if one does not answer, or not with these metrics."""
        now, arrived, busy = time.monotonic(), dict[str, float](), dict[str, int]()
        last: dict[str, tuple[dict[str, float], dict[str, int]]] = {}
        for url in self.urls:
            for address in _addresses(url):
                finished, waiting = _read(url, address)
                key = f"{url} {address}"
                last[key] = finished, waiting
                before = self._last.get(key, last[key])
                for pool in finished | waiting:
                    ended, here = finished.get(pool, 0.0), waiting.get(pool, 0)
                    busy[pool] = busy.get(pool, 0) + here
                    ended_before, here_before = before[0].get(pool, 0.0), before[1].get(pool, 0)
                    if ended < ended_before:  # the proxy was restarted
                        ended_before, here_before = 0.0, 0
                    # A probe waits and is not counted at its end, which is no restart.
                    new = max(0.0, ended - ended_before + here - here_before)
                    arrived[pool] = arrived.get(pool, 0.0) + new
        self._last = last
        self._arrived.append((now, arrived))
        # The first one kept is only where the window begins.
        while len(self._arrived) > 2 and now - self._arrived[1][0] >= self.window_s:
            self._arrived.popleft()
        if len(self._arrived) < 2:
            return Seen(None, busy)
        passed = max(1e-9, now - self._arrived[0][0])
        counted = [counts for _, counts in self._arrived][1:]
        return Seen({pool: sum(counts.get(pool, 0.0) for counts in counted) / passed for pool in arrived}, busy)


def _addresses(url: str) -> list[str]:
    """Return the addresses of a URL's host; of https only its name, which the certificate is for."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("give http://HOST:PORT/-/metrics")
        if parts.scheme == "https":
            return [host]
        found = socket.getaddrinfo(host, port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise CapacityError("demand-failed", f"{url}: {error}") from error
    return sorted({str(each[4][0]) for each in found})


def _read(url: str, address: str) -> tuple[dict[str, float], dict[str, int]]:
    """Return the requests that ended, and those that wait or are being answered, by pool. Raises CapacityError (demand-failed)."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(address, parts.port, timeout=ANSWER_LIMIT_S)
    headers = {"Host": parts.netloc.rpartition("@")[2]}
    if token := os.environ.get(_TOKEN):
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request("GET", parts.path or "/-/metrics", headers=headers)
        answer = connection.getresponse()
        body = _body(answer)
        if answer.status != 200:
            remedy = f"; give the admin token in {_TOKEN}" if answer.status in (401, 403) else ""
            raise CapacityError("demand-failed", f"{url} at {address} answers {answer.status}{remedy}")
        text = body.decode()
        ended, waiting = _parse(text)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CapacityError(
            "demand-failed", f"{url} at {address}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    finally:
        connection.close()
    if not ended:
        raise CapacityError(
            "demand-failed", f"{url} at {address} has no {_P}finished_total: is it a proxy's /-/metrics?"
        )
    return ended, waiting


def _body(answer: http.client.HTTPResponse) -> bytes:
    """Return all of an answer. Raises OSError if it takes longer than ANSWER_LIMIT_S, ValueError if it is too long."""
    body, until = b"", time.monotonic() + ANSWER_LIMIT_S
    while part := answer.read1(1 << 16):
        body += part
        if time.monotonic() > until:
            raise TimeoutError(f"the answer was not complete after {ANSWER_LIMIT_S:g} s")
        if len(body) > _MOST:
            raise ValueError(f"the answer is longer than {_MOST >> 20} MiB")
    return body


def _parse(text: str) -> tuple[dict[str, float], dict[str, int]]:
    ended: dict[str, float] = {}
    waiting: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (pool := sample.labels.get("pool")) is None:
                continue
            if sample.name == _P + "finished_total":
                ended[pool] = ended.get(pool, 0.0) + sample.value
            elif sample.name in (_P + "held", _P + "outstanding"):
                waiting[pool] = waiting.get(pool, 0) + int(sample.value)
    return ended, waiting
