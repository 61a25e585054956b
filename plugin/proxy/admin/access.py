"""Control access to the admin endpoints: status, metrics and the page for people.

They show commands, addresses and an engine's last output, so by default only clients of this host may read them. With a
token, every client needs it, including those of this host. On a port of their own (`--admin-listen`), any client of
that port may read them.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import parse_qs

from plugin.proxy.errors import ClientFault
from plugin.proxy.http.request import Request

_ASK = ((b"www-authenticate", b'Bearer realm="quickthaw"'),)
# Headers that reverse proxies add. A direct client of this host sends none of them.
_FORWARDED = frozenset(
    {b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"true-client-ip", b"cf-connecting-ip", b"x-cluster-client-ip"}
)


def check_access(request: Request, peer: bytes, *, token: str | None, own_port: bool) -> None:
    """Return if the client at `peer` may read an admin endpoint.

    Raises ClientFault: 401 (admin-token) if a token is set and missing, 403 (admin-local-only) if none is set and the
    client is not local.
    """
    if token is not None:
        if not _has_token(request, token.encode()):
            message = "this page needs the admin token: send Authorization: Bearer TOKEN"
            raise ClientFault("admin-token", message, status=401, headers=_ASK)
    elif not own_port and not is_local(request, peer):
        message = "without --admin-token or --admin-listen this page answers clients of its own host only"
        raise ClientFault("admin-local-only", message, status=403)


def is_local(request: Request, peer: bytes) -> bool:
    """Return True if the request comes from this host: over loopback, for a loopback name, and not through a reverse proxy.

    The name is checked because a web page can make a local browser request its own name at 127.0.0.1 (DNS rebinding). A
    UNIX socket does not count: usually a reverse proxy connects there.
    """
    if not _is_loopback(peer.decode("ascii", "replace")):
        return False
    if any(lower in _FORWARDED or lower.startswith(b"x-forwarded") for lower, _, _ in request.headers):
        return False
    host = request.host.decode("ascii", "replace").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or _is_loopback(name)


def _is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _has_token(request: Request, token: bytes) -> bool:
    for lower, _, value in request.headers:
        scheme, _, given = value.partition(b" ")
        if lower == b"authorization" and scheme.lower() == b"bearer":
            return hmac.compare_digest(given.strip(), token)
    query = parse_qs(request.target.partition(b"?")[2].decode("ascii", "replace"))
    return any(hmac.compare_digest(text.encode(), token) for text in query.get("token", ()))
