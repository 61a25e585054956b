"""Store URLs: the known schemes, and which URLs are directories of this machine. Quick to import."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from lazyfs.errors import Usage

# scheme → "module:function", called with the URL
SCHEMES = {
    "file": "lazyfs.stores.local:open_url",
    "s3": "lazyfs.stores.object_store:open_url",
    "gs": "lazyfs.stores.object_store:open_url",
    "az": "lazyfs.stores.object_store:open_url",
    "http": "lazyfs.stores.http:open_url",
    "https": "lazyfs.stores.http:open_url",
    "hf": "lazyfs.stores.hub:open_url",
    "oci": "lazyfs.stores.oci:open_url",
}

READ_ONLY = ("http", "https", "hf", "oci")
"""Schemes of stores that cannot be written as stores; `weights push oci://…` makes an artifact."""


def writable(url: str) -> bool:
    """Return whether chunks and manifests can be written to a store of this URL's scheme."""
    return url.partition("://")[0] not in READ_ONLY


def shown_url(url: str) -> str:
    """Return the URL for display: credentials and query (which may be a signature) are masked."""
    scheme, found, rest = url.partition("://")
    if not found or scheme in ("file", "hf"):  # of the hub, what follows an @ is a revision
        return url
    rest, query, _ = rest.partition("?")
    place, slash, path = rest.partition("/")
    _user, at, host = place.rpartition("@")
    return f"{scheme}://{'***@' if at else ''}{host}{slash}{path}{'?***' if query else ''}"


def without_user(url: str) -> str:
    """Return the URL without user and password, as used in persistent records."""
    scheme, found, rest = url.partition("://")
    if not found or scheme.rpartition(":")[2] in ("file", "hf"):
        return url
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def normal_url(url: str) -> str:
    """Turn a plain path into a file:// URL; return any other URL without a trailing slash.

    Raises Usage for an unknown scheme, a relative file URL, a missing host or bucket, or an invalid port.
    """
    scheme, found, _ = url.partition("://")
    if not found and url.startswith("file:"):
        raise Usage(f"{url!r}: write file:///an/absolute/path, or the path itself")
    if not found:
        return f"file://{os.path.abspath(Path(url).expanduser())}"
    if scheme not in SCHEMES:
        raise Usage(
            f"unknown store URL {shown_url(url)!r}: use a path or one of {', '.join(f'{s}://' for s in SCHEMES)}"
        )
    if scheme == "file":
        if not url.startswith("file:///"):
            raise Usage(f"{url!r} is not absolute: write file:///an/absolute/path, or the path itself")
        return url
    if not url.removeprefix(f"{scheme}://").strip("/"):
        raise Usage(f"{shown_url(url)!r} has no bucket or host; write {scheme}://NAME/…")
    try:
        urlsplit(url).port  # noqa: B018
    except ValueError as error:
        # urlsplit's own message would repeat the text in place of the port, which may be part of a password.
        raise Usage(f"{shown_url(url)!r}: the port is not a number") from error
    return url.rstrip("/")


def local_path(url: str) -> Path | None:
    """Return the folder of a file:// URL (taken literally: no percent escapes), else None."""
    scheme, _, rest = normal_url(url).partition("://")
    return Path(rest) if scheme == "file" else None
