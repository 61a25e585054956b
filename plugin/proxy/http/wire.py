"""HTTP/1.1 heads and framing as bytes: drop hop-by-hop headers, add the proxy's own, encode chunks. No I/O.

A header field is (lower-case name, name as sent, value). Names and values come from a strict parser (llhttp), so none
holds CR, LF or NUL.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from http import HTTPStatus

Field = tuple[bytes, bytes, bytes]

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te", b"transfer-encoding", b"upgrade"}
)
# An attacker could name these in Connection, and so strip them from a request that needs them or was authorised by them.
_NEVER_NAMED = frozenset({b"host", b"content-length", b"content-type", b"authorization", b"cookie", b"x-api-key"})
_FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-real-ip", b"forwarded"})
# Not relayed in an answer's trailers. RFC 9110 6.5.1: fields for framing, routing or authentication must not follow the
# body. A request's trailers are dropped: servers merge them into the headers, where they would pass for headers set by
# a proxy.
_NO_TRAILER = HOP_BY_HOP | {
    b"content-length",
    b"host",
    b"authorization",
    b"content-encoding",
    b"content-type",
    b"set-cookie",
}

_REASONS = {int(status): status.phrase.encode() for status in HTTPStatus}
LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def reason(status: int) -> bytes:
    """Return the standard phrase of a status."""
    return _REASONS.get(status, b"Unknown")


def new_request_id() -> str:
    """Return a new request id: 24 hex digits."""
    return os.urandom(12).hex()


def usable_request_id(value: bytes) -> bool:
    """Return True if a client's own id may be kept: at most 128 visible ASCII characters without quotes."""
    return 0 < len(value) <= 128 and value.isascii() and all(33 <= c < 127 and c != 34 for c in value)


def named_in_connection(values: Iterable[bytes]) -> frozenset[bytes]:
    """Return the header names that `Connection` declares as hop-by-hop."""
    named = {token.strip().lower() for value in values for token in value.split(b",")}
    return frozenset(named - _NEVER_NAMED)


def chunk(data: bytes) -> bytes:
    """Encode `data`, which must not be empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Iterable[Field]) -> bytes:
    """Return the end of an answer's chunked body, with the trailers that may be relayed."""
    kept = [b"%b: %b\r\n" % (name, value) for lower, name, value in trailers if lower not in _NO_TRAILER]
    return b"0\r\n" + b"".join(kept) + b"\r\n" if kept else LAST_CHUNK


def request_head(
    method: bytes,
    target: bytes,
    headers: Iterable[Field],
    *,
    drop: frozenset[bytes],
    host: bytes,
    client_host: bytes,
    peer: bytes,
    scheme: bytes,
    request_id: bytes,
    trust_forwarded: bool,
    chunked: bool,
    upgrade: bytes | None,
) -> bytes:
    """Build the head for a replica: drop hop-by-hop fields, set the forwarding fields and the request id."""
    out = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, host)]
    forwarded_for = b""
    proto = forwarded_host = False
    for lower, name, value in headers:
        if lower in drop:
            continue
        if lower in _FORWARDED:
            if not trust_forwarded:
                continue
            if lower == b"x-forwarded-for":
                forwarded_for += value + b", "
                continue
            proto = proto or lower == b"x-forwarded-proto"
            forwarded_host = forwarded_host or lower == b"x-forwarded-host"
        out.append(b"%b: %b\r\n" % (name, value))
    out.append(b"x-request-id: %b\r\nx-forwarded-for: %b%b\r\n" % (request_id, forwarded_for, peer))
    if not proto:
        out.append(b"x-forwarded-proto: %b\r\n" % scheme)
    if not forwarded_host and client_host:
        out.append(b"x-forwarded-host: %b\r\n" % client_host)
    if chunked:
        out.append(b"transfer-encoding: chunked\r\n")
    if upgrade is not None:
        out.append(b"connection: upgrade\r\nupgrade: %b\r\n" % upgrade)
    out.append(b"\r\n")
    return b"".join(out)


REQUEST_DROP = HOP_BY_HOP | {b"host", b"expect", b"x-request-id"}


def answer_fields(headers: list[Field], request_id: bytes) -> list[Field]:
    """Return the fields of a replica's answer that are relayed, with the request id unless the replica set one."""
    kept = [field for field in headers if field[0] not in HOP_BY_HOP]
    if len(kept) < len(headers):
        connection = [value for lower, _, value in headers if lower == b"connection"]
        if connection and (extra := named_in_connection(connection) - {b"close", b"keep-alive", b"upgrade"}):
            kept = [field for field in kept if field[0] not in extra]
    for field in kept:
        if field[0] == b"x-request-id":
            break
    else:
        kept.append((b"x-request-id", b"x-request-id", request_id))
    return kept


def response_head(
    status: int,
    phrase: bytes,
    headers: list[Field],
    *,
    request_id: bytes,
    chunked: bool,
    close: bool,
    upgrade: bytes | None = None,
) -> bytes:
    """Build the client's head for a replica's answer: drop hop-by-hop headers, set the framing's own."""
    out = [b"HTTP/1.1 %d %b\r\n" % (status, phrase)]
    out += [b"%b: %b\r\n" % (name, value) for _, name, value in answer_fields(headers, request_id)]
    if chunked:
        out.append(b"transfer-encoding: chunked\r\n")
    if upgrade is not None:
        out.append(b"connection: upgrade\r\nupgrade: %b\r\n" % upgrade)
    elif close:
        out.append(b"connection: close\r\n")
    out.append(b"\r\n")
    return b"".join(out)


def own_response(
    status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, *, request_id: bytes, close: bool, head_only: bool
) -> bytes:
    """Build a complete response of the proxy itself."""
    out = [b"HTTP/1.1 %d %b\r\n" % (status, reason(status))]
    out += [b"%b: %b\r\n" % field for field in headers]
    out.append(b"content-length: %d\r\nx-request-id: %b\r\n" % (len(body), request_id))
    if close:
        out.append(b"connection: close\r\n")
    out.append(b"\r\n")
    if not head_only:
        out.append(body)
    return b"".join(out)
