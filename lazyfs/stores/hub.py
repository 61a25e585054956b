"""A model of the Hugging Face hub as a read-only store: `hf://ORG/MODEL[@REVISION]`, read by ranges as it is needed.

Endpoint and token are those of huggingface_hub: $HF_ENDPOINT, $HF_TOKEN, the token file of `hf auth login`. A revision is
resolved once, to a commit, whose files never change. The version of a file is the digest that the hub gives:
`sha256:HEX` of a large file, `git:HEX` (the SHA-1 of a git blob) of any other.

The address that the hub redirects a file to is kept for a while: asking it before every chunk would meet its rate limit. Where
an address refuses ranges, huggingface_hub itself downloads the file.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lazyfs.errors import HostLacks, LazyfsError, NotFound, Permanent, Usage
from lazyfs.stores.base import MOST_BYTES, ObjectInfo
from lazyfs.stores.http import WebStore
from lazyfs.stores.hub_rules import is_commit, is_offline
from lazyfs.stores.local import LocalStore

_URL = re.compile(r"hf://([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w][\w./-]*))?")
_NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')
# Signed addresses hold for an hour; a few minutes save as much.
_KEPT_S = 300.0
# The hub's list of files comes in pages of a thousand.
_PAGES = 1000
# What an address answers that serves no ranges: a whole file that is too large, or a refusal.
_NO_RANGES = ("too-large", "refused")
# Formats of other frameworks, and those of the same weights beside safetensors: engines read one format.
_NEVER_READ = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.mlmodel", "*.mlpackage/*")
_BESIDE_SAFETENSORS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.npz", "original/*")


def open_url(url: str) -> HubStore:
    """Return the store of an hf:// URL."""
    return HubStore(url)


def parse(url: str) -> tuple[str, str]:
    """Return repository and revision (`main` unless given). Raises Usage."""
    found = _URL.fullmatch(url.rstrip("/"))
    if found is None or ".." in (found[2] or "").split("/"):
        raise Usage(f"{url!r} is not a model of the hub; write hf://ORG/MODEL or hf://ORG/MODEL@REVISION")
    return found[1], found[2] or "main"


def read_by_engines(paths: Iterable[str]) -> set[str]:
    """Return those of a repository's files that an engine may read: not other frameworks' weights, and one format of several."""
    paths = set(paths)
    left_out: tuple[str, ...] = _NEVER_READ
    if any(path.endswith(".safetensors") and "/" not in path for path in paths):
        left_out += _BESIDE_SAFETENSORS
    return {path for path in paths if not any(fnmatch.fnmatchcase(path, pattern) for pattern in left_out)}


def _endpoint() -> str:
    if given := os.environ.get("HF_ENDPOINT"):
        return given.rstrip("/")
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError as error:
        raise HostLacks(
            f"hf:// needs huggingface_hub ({error}) or $HF_ENDPOINT; pip install 'quickthaw[hub]'", code="hub-no-client"
        ) from error
    return str(ENDPOINT).rstrip("/")


def _token() -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if given := os.environ.get(name):
            return given.strip()
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser().read_text().strip()
    except (OSError, RuntimeError):
        return ""


def _info(entry: dict[str, Any]) -> ObjectInfo:
    """Return a file of the hub's list. Raises KeyError, TypeError, ValueError or AttributeError for what is none."""
    large = entry.get("lfs") or {}
    digest = large.get("oid") or large.get("sha256")
    version = f"sha256:{digest}" if digest else f"git:{entry['oid']}"
    return ObjectInfo(str(entry["path"]), int(large.get("size") or entry["size"]), 0.0, version)


class HubStore(WebStore):
    """The files of one commit. Safe to use from many threads."""

    def __init__(self, url: str) -> None:
        self.repository, self.revision = parse(url)
        endpoint = _endpoint()
        super().__init__(endpoint)
        self.url = f"hf://{self.repository}@{self.revision}"
        self._headers.pop("Authorization", None)
        if token := _token():
            self._headers["Authorization"] = f"Bearer {token}"
        self._commit = self.revision if is_commit(self.revision) else ""
        self._files: dict[str, ObjectInfo] | None = None
        self._addresses: dict[str, tuple[str, float]] = {}
        self._downloaded: dict[str, Path] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def commit(self) -> str:
        """Return the commit of the revision, asked for once. Raises NotFound, Permanent, Temporary."""
        if not self._commit:
            if is_offline(os.environ):
                raise Permanent(
                    f"{self.url}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so the hub is not asked; name a commit",
                    code="offline",
                )
            path = f"api/models/{self.repository}/revision/{quote(self.revision, safe='')}"
            answer = self._api(f"{self.base}/{path}")[0]
            found = str(answer.get("sha", "")) if isinstance(answer, dict) else ""
            if not is_commit(found):
                raise Permanent(f"{self.url}: the hub names no commit", code="hub-answer")
            self._commit = found
        return self._commit

    @property
    def pinned(self) -> str:
        """Return the URL of this commit."""
        return f"hf://{self.repository}@{self.commit}"

    def _api(self, url: str) -> tuple[Any, str]:
        """Return a JSON document of the hub, and the URL of the next page or ""."""
        try:
            _, answer, body, _ = self._follow("GET", url, {}, None, MOST_BYTES)
            following = _NEXT.search(answer.get("Link", ""))
            return json.loads(bytes(body)), following[1] if following else ""
        except ValueError as error:
            raise Permanent(
                f"{self.url}: the hub's answer is no JSON; check $HF_ENDPOINT", code="hub-answer"
            ) from error

    def _status_error(self, status: int, url: str, answer: Any) -> LazyfsError:
        reason = answer.get("X-Error-Code", "")
        if status in (401, 403) and reason in ("RepoNotFound", "GatedRepo", ""):
            why = "access to it is restricted" if reason == "GatedRepo" else "no such model, or a private one"
            return Permanent(f"{self.url}: {why} (HTTP {status}); give $HF_TOKEN", code="permission-denied")
        return super()._status_error(status, url, answer)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from (info for info in self.files().values() if info.key.startswith(prefix))

    def files(self) -> dict[str, ObjectInfo]:
        """Return the commit's files by path, asked for once: they never change. Raises what `commit` raises."""
        if self._files is None:
            self._files = {info.key: info for info in self._list()}
        return self._files

    def _list(self) -> Iterator[ObjectInfo]:
        url = f"{self.base}/api/models/{self.repository}/tree/{self.commit}?recursive=true"
        for _ in range(_PAGES):
            page, url = self._api(url)
            try:
                found = [_info(entry) for entry in page if entry.get("type") == "file"]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise Permanent(
                    f"{self.url}: the hub's list of files cannot be read; check $HF_ENDPOINT", code="hub-answer"
                ) from error
            yield from found
            if not url:
                return
        raise Permanent(f"{self.url}: the hub's list of files does not end", code="hub-answer")

    def head(self, key: str) -> ObjectInfo | None:
        return self.files().get(key)

    def _read(
        self, key: str, start: int, length: int | None, version: str, into: memoryview | None, limit: int
    ) -> bytes | memoryview:
        if key not in self._downloaded:
            try:
                # A commit's file never changes: its version needs no check.
                body = super()._read(key, start, length, "", into, limit)
            except Permanent as error:
                if error.code not in _NO_RANGES:
                    raise
            else:
                # Nothing reads beyond a file's end: an empty body is HTTP 416, from an address that serves no ranges.
                if body:
                    return body
            self._download(key)
        file = self._downloaded[key]
        return LocalStore(file.parent).get(file.name, start, length, "", into, limit=limit)

    def _request(
        self, method: str, key: str, headers: dict[str, str], into: memoryview | None, limit: int
    ) -> tuple[int, Any, bytes | memoryview]:
        """Ask the address that the hub has given for the file before, or the hub."""
        address, since = self._addresses.get(key, ("", 0.0))
        if address and time.monotonic() - since < _KEPT_S:
            try:
                return self._follow(method, address, headers, into, limit)[:3]
            except (Permanent, NotFound):
                # A signed address has expired, or its host no longer has the file: the hub knows a new one.
                self._addresses.pop(key, None)
        asked = f"{self.base}/{self.repository}/resolve/{self.commit}/{quote(key)}"
        status, answer, body, final = self._follow(method, asked, headers, into, limit)
        if final != asked:
            self._addresses[key] = (final, time.monotonic())
        return status, answer, body

    def _download(self, key: str) -> None:
        """Let huggingface_hub download a file into its own cache, once."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._downloaded:
                self._downloaded[key] = Path(
                    self._client()(
                        self.repository, key, revision=self.commit, endpoint=self.base, token=_token() or None
                    )
                )

    def _client(self) -> Callable[..., str]:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError
        except ImportError as error:
            raise HostLacks(
                f"{self.url} is not served by ranges, and huggingface_hub is not here ({error}); "
                "pip install 'quickthaw[hub]'",
                code="hub-no-client",
            ) from error

        def download(*arguments: Any, **named: Any) -> str:
            try:
                return str(hf_hub_download(*arguments, **named))
            except (HfHubHTTPError, OSError) as error:
                raise Permanent(f"{self.url}: {' '.join(str(error).split())[:300]}", code="hub-download") from error

        return download
