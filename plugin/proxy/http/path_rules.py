"""Decide which request targets belong to the admin endpoints, which are denied, and which pass, on every reading of the path.

An engine decodes percent escapes once and matches the result, dots included. Intermediaries decode again, merge
slashes, resolve dots, or cut the path at a decoded `?`. A target is denied when any of these readings is a denied path,
so no spelling of a denied path or admin endpoint ever reaches the engine.

A target that passes either wakes an engine and counts as its use, or does neither (`Verdict.QUIET`): probes, scrapes, and
paths that `--wake-on` does not name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from fnmatch import translate
from urllib.parse import unquote_to_bytes

_ABSOLUTE = re.compile(rb"^[a-zA-Z][a-zA-Z0-9+.\-]*://")
_INVISIBLE = bytes(range(33)) + b"\x7f"
_CACHE_MAX = 4096
_CACHED = 512
"""Bytes of the longest path whose verdict is kept: 4,096 different ones of 60 KiB would be 245 MB."""
_DECODINGS = 4
_STRIPPED = 3
_LONGEST = 8192
"""Maximum bytes of a path that is not plain. Checking takes about 1 µs for 3 bytes, on the event loop."""
# Such a path has one reading only: no escape, no parameter, no empty or dotted segment.
_PLAIN = re.compile(rb"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9_\-.~:@!$&'()*+,=]+)+/?")
PREFIX_MATCHED = ("/metrics", "/health", "/ready")
"""Paths that engines match by prefix: `/metricsx` serves the metrics on vLLM and SGLang (`^/metrics(?P<path>.*)$`), and
SGLang asks for no key when a path begins with one of them (srt/utils/auth.py).
"""
HEALTH = frozenset({"/health", "/ping"})
"""Probes that only ask whether requests are served."""
PROBES = HEALTH | {"/metrics", "/v1/models", "/version"}
"""Paths that monitoring asks for again and again: they wake no engine, unless `--wake-on` names the path itself."""
_MODEL = "/v1/models/"
_GLOB = re.compile(r"[*?\[]")


class Verdict(Enum):
    """What to do with a path."""

    PASS = "pass"
    QUIET = "quiet"
    """It passes to an engine that is awake, but wakes none and does not keep one awake."""
    ADMIN = "admin"
    DENIED = "denied"


def _text(parts: list[bytes]) -> str:
    return "/" + b"/".join(parts).decode("utf-8", "replace").casefold()


def _parts(path: bytes) -> list[bytes]:
    """Return the non-empty segments, without parameters and invisible characters; backslashes count as slashes."""
    parts = (part.split(b";", 1)[0].translate(None, _INVISIBLE) for part in path.replace(b"\\", b"/").split(b"/"))
    return [part for part in parts if part not in (b"", b".")]


def _resolve(parts: list[bytes]) -> list[bytes]:
    """Return the segments with `..` resolved."""
    found: list[bytes] = []
    for part in parts:
        if part != b"..":
            found.append(part)
        elif found:
            found.pop()
    return found


def canonical(path: bytes) -> str:
    """Return the path with escapes decoded (to a fixed point), backslashes turned, slashes merged, dots resolved, and case folded."""
    for _ in range(_DECODINGS):
        decoded = unquote_to_bytes(path)
        if decoded == path:
            break
        path = decoded
    return _text(_resolve(_parts(re.split(rb"[?#]", path, maxsplit=1)[0])))


def readings(path: bytes) -> set[str]:
    """Return every reading (case folded) that an engine or an intermediary may make of the path.

    Escapes decoded any number of times, dots resolved or kept, cut or not at a `?` or `#` that an escape hid.
    """
    if _PLAIN.fullmatch(path):
        return {path.decode().casefold().rstrip("/")}
    found: set[str] = set()
    for _ in range(_DECODINGS + 1):
        for cut in {path, path.split(b"?", 1)[0], path.split(b"#", 1)[0]}:
            parts = _parts(cut)
            found.add(_text(parts))
            found.add(_text(_resolve(parts)))
        decoded = unquote_to_bytes(path)
        if decoded == path:
            break
        path = decoded
    return found


def check_denied(path: str, verb: str = "deny") -> str:
    """Return the path if it can be denied (or allowed). Raises ValueError if it matches every path, or none."""
    if canonical(path.encode()) == "/":
        raise ValueError(
            f"cannot {verb} {path!r}, which is every path of the engine or none; name one, such as /metrics"
        )
    return path


def check_wake_on(path: str) -> str:
    """Return the path or glob if it can name what wakes an engine. Raises ValueError unless it begins with a slash."""
    if not path.startswith("/"):
        raise ValueError(
            f"{path!r} names no path; write /v1 for it and all below it, /v1/*/x for a glob, / for every path"
        )
    return path


def absolute_form(target: bytes) -> tuple[bytes, bytes] | None:
    """Split `http://host/path` into (host, path). Return None if the target is not in absolute form."""
    match = _ABSOLUTE.match(target)
    if match is None:
        return None
    host, slash, rest = target[match.end() :].partition(b"/")
    if not slash and b"?" in host:
        host, _, query = host.partition(b"?")
        return host, b"/?" + query
    return host, b"/" + rest


class PathRules:
    """Decide on targets for one proxy; up to 4,096 verdicts are cached.

    `root_path`: a prefix that the engine strips before it matches (vLLM's `--root-path`); denied paths are denied
    behind it too. `allowed`: exceptions from the denied paths, with everything below them. `wake_on`: paths, with everything
    below them, and globs (`*` matches slashes too) that wake an engine; all others are QUIET.
    """

    def __init__(
        self,
        admin_prefix: str,
        denied: frozenset[str],
        root_path: str = "",
        allowed: frozenset[str] = frozenset(),
        wake_on: Iterable[str] = ("/",),
    ) -> None:
        self._admin = admin_prefix.encode()
        self._admin_canonical = canonical(self._admin)
        self._denied = frozenset(canonical(path.encode()) for path in denied)
        self._allowed = frozenset(canonical(path.encode()) for path in allowed)
        self._denied_prefixes = tuple(path for path in self._denied if path in PREFIX_MATCHED)
        root = canonical(root_path.encode())
        self._root = "" if root == "/" else root
        self._waking = frozenset(canonical(path.encode()) for path in wake_on if not _GLOB.search(path))
        self._waking_globs = [path.casefold() for path in wake_on if _GLOB.search(path)]
        self._waking_glob: re.Pattern[str] | None = None
        """All globs as one, compiled when a path first needs them: a restore's first request seldom does."""
        self._cache: dict[bytes, Verdict] = {}

    def classify(self, target: bytes) -> Verdict:
        """Return ADMIN for the plainly spelled admin prefix, DENIED for its other spellings and for denied paths, else PASS or QUIET."""
        path = target.partition(b"?")[0]
        verdict = self._cache.get(path)
        if verdict is None:
            verdict = self._classify(path)
            if len(path) > _CACHED:
                return verdict
            if len(self._cache) >= _CACHE_MAX:
                self._cache.clear()
            self._cache[path] = verdict
        return verdict

    def _classify(self, path: bytes) -> Verdict:
        if len(path) > _LONGEST and not _PLAIN.fullmatch(path):
            return Verdict.DENIED
        seen = readings(path)
        if any(_below(reading, self._admin_canonical) for reading in seen):
            plain = path == self._admin or path.startswith(self._admin + b"/")
            return (
                Verdict.ADMIN
                if plain and b"%" not in path and b".." not in path and b"//" not in path
                else Verdict.DENIED
            )
        if any(self._is_denied(reading) for reading in seen):
            return Verdict.DENIED
        return Verdict.PASS if self._wakes(self.engine_path(path)) else Verdict.QUIET

    def engine_path(self, target: bytes) -> str:
        """Return the path of a target in one spelling, as the engine matches it: canonical, and without its root path."""
        path = canonical(target.partition(b"?")[0])
        if self._root and _below(path, self._root):
            path = path[len(self._root) :] or "/"
        return path

    def _wakes(self, path: str) -> bool:
        if path in PROBES or path.startswith(_MODEL):
            return path in self._waking
        if any(waking == "/" or _below(path, waking) for waking in self._waking):
            return True
        if self._waking_globs and self._waking_glob is None:
            self._waking_glob = re.compile("|".join(map(translate, self._waking_globs)))
        return self._waking_glob is not None and self._waking_glob.match(path) is not None

    def _is_denied(self, reading: str) -> bool:
        for _ in range(_STRIPPED):
            denied = reading.startswith(self._denied_prefixes) or any(_below(reading, path) for path in self._denied)
            if denied and not any(_below(reading, path) for path in self._allowed):
                return True
            if not self._root or not _below(reading, self._root):
                return False
            reading = reading[len(self._root) :]
        return False


def _below(reading: str, path: str) -> bool:
    return reading == path or reading.startswith(path + "/")
