"""Which request targets are the proxy's own, which are denied, and which pass: decided on the path as the engine
would understand it.

The engine decodes percent escapes once and matches the result; intermediaries may also merge slashes or resolve dots.
A target is
judged by its most dangerous reading, so that no spelling of a denied or own path ever reaches the engine.
"""

from __future__ import annotations

import re
from enum import Enum
from urllib.parse import unquote_to_bytes

_ABSOLUTE = re.compile(rb"^[a-zA-Z][a-zA-Z0-9+.\-]*://")
_INVISIBLE = bytes(range(33)) + b"\x7f"
_CACHE_MAX = 4096


class Verdict(Enum):
    """What is to be done with a path."""

    PASS = "pass"
    OWN = "own"
    DENIED = "denied"


def canonical(path: bytes) -> str:
    """The path with escapes decoded (to a fixed point), back-slashes turned, slashes merged, dots resolved, and
    case folded.
    """
    for _ in range(4):
        decoded = unquote_to_bytes(path)
        if decoded == path:
            break
        path = decoded
    parts: list[bytes] = []
    for part in path.replace(b"\\", b"/").split(b"?", 1)[0].split(b"#", 1)[0].split(b"/"):
        part = part.split(b";", 1)[0].translate(None, _INVISIBLE)
        if part == b"..":
            if parts:
                parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return "/" + b"/".join(parts).decode("utf-8", "replace").casefold()


def absolute_form(target: bytes) -> tuple[bytes, bytes] | None:
    """Split `http://host/path` into (host, path); None when the target is not in absolute form."""
    match = _ABSOLUTE.match(target)
    if match is None:
        return None
    host, slash, rest = target[match.end() :].partition(b"/")
    if not slash and b"?" in host:
        host, _, query = host.partition(b"?")
        return host, b"/?" + query
    return host, b"/" + rest


class PathRules:
    """Judges targets for one proxy; verdicts of seen paths are kept (at most 4,096)."""

    def __init__(self, own_prefix: str, denied: frozenset[str]) -> None:
        self._own = own_prefix.encode()
        self._own_canonical = canonical(self._own)
        self._denied = frozenset(canonical(path.encode()) for path in denied)
        self._cache: dict[bytes, Verdict] = {}

    def judge(self, target: bytes) -> Verdict:
        """OWN for the own prefix spelled plainly, DENIED for any other spelling of it and for denied paths, else
        PASS.
        """
        path = target.partition(b"?")[0]
        verdict = self._cache.get(path)
        if verdict is None:
            verdict = self._judge(path)
            if len(self._cache) >= _CACHE_MAX:
                self._cache.clear()
            self._cache[path] = verdict
        return verdict

    def _judge(self, path: bytes) -> Verdict:
        seen = canonical(path)
        if seen == self._own_canonical or seen.startswith(self._own_canonical + "/"):
            plain = path == self._own or path.startswith(self._own + b"/")
            return (
                Verdict.OWN
                if plain and b"%" not in path and b".." not in path and b"//" not in path
                else Verdict.DENIED
            )
        parts = seen.split("/")
        for end in range(2, len(parts) + 1):
            if "/".join(parts[:end]) in self._denied:
                return Verdict.DENIED
        return Verdict.PASS
