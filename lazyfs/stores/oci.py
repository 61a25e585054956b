"""Weights in an OCI registry: `oci://HOST/REPOSITORY[:TAG|@DIGEST]`, as ORAS and ModelPack lay them out, one layer for each file.

Reading is that of any store, by ranges of blobs; a file's version is its layer's SHA-256. Credentials are those of
`docker login` in $DOCKER_CONFIG or ~/.docker (helpers are not run). A registry on loopback is spoken to without TLS, as usual.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from lazyfs.errors import Integrity, LazyfsError, NotFound, Permanent, Temporary, Usage
from lazyfs.stores.base import MOST_BYTES, ObjectInfo
from lazyfs.stores.http import WebStore, connect, origin, response_within
from lazyfs.stores.retry import RetryPolicy, retrying
from lazyfs.stores.urls import shown_url

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_URL = re.compile(
    rf"oci://([A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-f:]+\](?::\d+)?)/({_PART}(?:/{_PART})*)"
    r"(?::([\w][\w.-]{0,127})|@(sha256:[0-9a-f]{64}))?"
)
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
# The media types of ModelPack (CNCF).
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT, OTHER = "application/vnd.cncf.model.weight.v1.raw", "application/vnd.cncf.model.doc.v1.raw"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TITLE = "org.opencontainers.image.title"
# The pace below which an upload is given up, bytes per second.
_SLOWEST = 256 << 10
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


def open_url(url: str) -> OciStore:
    """Return the store of an oci:// URL."""
    return OciStore(url)


@dataclass(frozen=True)
class Layer:
    """One file of an artifact. `digest`: `sha256:HEX`."""

    path: str
    size: int
    digest: str
    media_type: str = OTHER


def parse(url: str) -> tuple[str, str, str]:
    """Return host, repository, and tag or digest (`latest` unless given). Raises Usage."""
    found = _URL.fullmatch(url.rstrip("/"))
    if found is None:
        raise Usage(f"{url!r} names no artifact; write oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:…")
    return found[1], found[2], found[4] or found[3] or "latest"


def _credentials(host: str) -> str:
    """Return what `docker login` has stored for a registry (base64 of user:password), or ""."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser()
    try:
        known = json.loads((folder / "config.json").read_bytes()).get("auths", {})
    except (OSError, ValueError, AttributeError):
        return ""
    entry = known.get(host) or known.get(f"https://{host}") or {}
    return str(entry.get("auth", ""))


class OciStore(WebStore):
    """The files of one artifact. Safe to use from many threads."""

    def __init__(self, url: str) -> None:
        self.host, self.repository, self.reference = parse(url)
        local = _LOOPBACK.fullmatch(self.host)
        super().__init__(f"{'http' if local else 'https'}://{self.host}/v2/{self.repository}")
        self.url = f"oci://{self.host}/{self.repository}{'@' if ':' in self.reference else ':'}{self.reference}"
        self._headers.pop("Authorization", None)
        self._basic = _credentials(self.host)
        self._layers: dict[str, Layer] | None = None
        self._digest = self.reference if ":" in self.reference else ""
        self._loading = threading.Lock()

    # -- reading

    @property
    def pinned(self) -> str:
        """Return the URL of this very artifact, by its digest."""
        self.layers()
        return f"oci://{self.host}/{self.repository}@{self._digest}"

    def layers(self) -> dict[str, Layer]:
        """Return the artifact's files by path. Raises NotFound, Integrity, Permanent (bad-artifact), or Temporary."""
        with self._loading:
            if self._layers is None:
                self._layers = self._read_layers()
        return self._layers

    def _read_layers(self) -> dict[str, Layer]:
        headers = {"Accept": f"{MANIFEST}, {INDEX}"}
        _, answer, body = self._request("GET", f"manifests/{self.reference}", headers, None, MOST_BYTES)
        found = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if self._digest and found != self._digest:
            raise Integrity(f"{self.url}: the registry sent another manifest than {self._digest[:19]}")
        self._digest = found
        try:
            document = json.loads(bytes(body))
            layers = [
                Layer(str(one["annotations"][TITLE]), int(one["size"]), str(one["digest"]), str(one["mediaType"]))
                for one in document["layers"]
                if TITLE in one.get("annotations", {})
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Permanent(
                f"{self.url} is no artifact of files, but {answer.get('Content-Type', '?')}", code="bad-artifact"
            ) from error
        for one in layers:
            parts = one.path.split("/")
            if (
                any(part in ("", ".", "..") for part in parts)
                or "\0" in one.path
                or not re.fullmatch(r"sha256:[0-9a-f]{64}", one.digest)
            ):
                raise Permanent(f"{self.url} has a file that no directory can have: {one.path!r}", code="bad-artifact")
            if one.media_type.endswith((".tar", "+gzip", ".tar.gz")):
                why = f"{one.path} is an archive, which cannot be read in place; unpack it with its own tool"
                raise Permanent(f"{self.url}: {why}", code="bad-artifact")
        if not layers:
            raise NotFound(f"{self.url} has no files (no layer has a title)")
        return {one.path: one for one in layers}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for one in self.layers().values():
            if one.path.startswith(prefix):
                yield ObjectInfo(one.path, one.size, 0.0, one.digest)

    def head(self, key: str) -> ObjectInfo | None:
        one = self.layers().get(key)
        return ObjectInfo(one.path, one.size, 0.0, one.digest) if one is not None else None

    def _read(
        self, key: str, start: int, length: int | None, version: str, into: memoryview | None, limit: int
    ) -> bytes | memoryview:
        # The version is the blob's own name: a blob never changes, so the artifact need not be asked for.
        if not version:
            if key not in self.layers():
                raise NotFound(f"{self.url} has no file {key}")
            version = self.layers()[key].digest
        return super()._read(f"blobs/{version}", start, length, "", into, limit)

    # -- writing

    def push(self, files: Iterable[tuple[Layer, Callable[[], Iterator[bytes]]]]) -> tuple[str, int]:
        """Upload files and the manifest that names them; return its digest and how many blobs the registry lacked.

        Each file is its layer and a function that yields its bytes. Raises Permanent, Temporary.
        """
        layers, new = [], 0
        for layer, read in files:
            new += self._blob(layer.digest, layer.size, read)
            layers.append(layer)
        config = b"{}"
        digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        new += self._blob(digest, len(config), lambda: iter([config]))
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": {"mediaType": CONFIG, "digest": digest, "size": len(config)},
            "layers": [
                {"mediaType": one.media_type, "digest": one.digest, "size": one.size, "annotations": {TITLE: one.path}}
                for one in layers
            ],
        }
        body = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
        name = f"sha256:{hashlib.sha256(body).hexdigest()}"
        where = self.reference if ":" not in self.reference else name
        retrying(
            lambda: self._write("PUT", f"{self.base}/manifests/{where}", body, {"Content-Type": MANIFEST}),
            RetryPolicy(),
        )
        return name, new

    def _blob(self, digest: str, size: int, read: Callable[[], Iterator[bytes]]) -> bool:
        """Upload a blob unless the registry has it; return whether it lacked it."""

        def there() -> bool:
            try:
                self._request("HEAD", f"blobs/{digest}", {}, None, 0)
            except NotFound:
                return False
            return True

        if retrying(there, RetryPolicy()):
            return False

        def upload() -> None:
            place = self._write("POST", f"{self.base}/blobs/uploads/", b"", {})
            target = self._redirected(f"{self.base}/blobs/uploads/", place)
            target += ("&" if urlsplit(target).query else "?") + urlencode({"digest": digest})
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            # Whoever takes a little now and then would else hold an upload for ever.
            deadline = time.monotonic() + self.whole_s + size / _SLOWEST

            def parts() -> Iterator[bytes]:
                for part in read():
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"the registry takes less than {_SLOWEST >> 10} KiB/s")
                    yield part

            self._write("PUT", target, parts(), headers)

        retrying(upload, RetryPolicy())
        return True

    def _write(self, method: str, url: str, body: Any, headers: dict[str, str]) -> str:
        """Send a body; return the Location of the answer. Raises Permanent, Temporary."""
        for attempt in (0, 1):
            parts = urlsplit(url)
            connection = connect(url, self.whole_s)
            try:
                sent = {**self._headers, **headers}
                if origin(url) != origin(self.base):
                    sent.pop("Authorization", None)
                connection.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, body, sent)
                # A registry hashes a large blob before it answers.
                response = response_within(connection, time.monotonic() + self.whole_s, self.whole_s)
                response.read(4096)
                if response.status in (200, 201, 202, 204):
                    return response.headers.get("Location", "")
                refused = self._status_error(response.status, url, response.headers)
                if isinstance(refused, _Unauthorized) and attempt == 0 and self._sign_in(refused.headers):
                    if isinstance(body, bytes):
                        continue
                    # The token expired while the blob was sent. Its iterator has been used: the upload begins again.
                    raise Temporary(f"{self.url}: the token expired during an upload")
                raise refused
            except (OSError, http.client.HTTPException) as error:
                raise Temporary(f"{self.url}: {error or type(error).__name__}") from error
            finally:
                connection.close()
        raise Permanent(f"{self.url}: the registry refuses the credentials", code="permission-denied")

    # -- credentials

    def _request(
        self, method: str, key: str, headers: dict[str, str], into: memoryview | None, limit: int
    ) -> tuple[int, Any, bytes | memoryview]:
        """Send a request; once more with the token that the registry's challenge asks for. `key`: below the repository's URL."""
        try:
            return self._follow(method, f"{self.base}/{key}", headers, into, limit)[:3]
        except _Unauthorized as error:
            if not self._sign_in(error.headers):
                raise
            return self._follow(method, f"{self.base}/{key}", headers, into, limit)[:3]

    def _status_error(self, status: int, url: str, answer: Any) -> LazyfsError:
        if status == 401 and origin(url) == origin(self.base):
            return _Unauthorized(f"{self.url}: HTTP 401; docker login {self.host}", answer)
        if status == 401:
            # Answering its challenge would send the registry's password to whoever a blob or an upload is redirected to.
            return Permanent(f"{self.url}: HTTP 401 by {origin(url)[1]}", code="permission-denied")
        if status == 404:
            return NotFound(f"{self.url}: HTTP 404")
        return super()._status_error(status, self.url, answer)

    def _sign_in(self, answer: Any) -> bool:
        """Take the credentials that a challenge asks for; return whether there are others than before."""
        challenge, before = answer.get("WWW-Authenticate", ""), self._headers.get("Authorization")
        if challenge.lower().startswith("bearer"):
            fields = dict(_CHALLENGE.findall(challenge))
            realm = fields.pop("realm", "")
            if urlsplit(realm).scheme not in ("http", "https") or (
                self.base.startswith("https:") and not realm.startswith("https:")
            ):
                return False
            scope = f"repository:{self.repository}:pull,push" if self._basic else f"repository:{self.repository}:pull"
            token = self._token(f"{realm}?{urlencode({**fields, 'scope': fields.get('scope') or scope})}")
            new = f"Bearer {token}" if token else ""
        else:
            new = f"Basic {self._basic}" if self._basic else ""
        if new and new != before:
            self._headers["Authorization"] = new
            return True
        return False

    def _token(self, url: str) -> str:
        """Return the token that the registry's token service gives, or "" if it refuses. Raises Temporary."""
        parts = urlsplit(url)
        connection = connect(url, self.inactivity_s)
        try:
            headers = {"User-Agent": "quickthaw"} | ({"Authorization": f"Basic {self._basic}"} if self._basic else {})
            connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
            response = response_within(connection, time.monotonic() + self.whole_s, self.inactivity_s)
            if response.status != 200:
                refused = super()._status_error(response.status, shown_url(url), response.headers)
                if isinstance(refused, Temporary):
                    raise refused
                return ""  # the challenge stays unanswered, and is reported as such
            found = json.loads(response.read(1 << 20))
            token = str(found.get("token") or found.get("access_token") or "")
            return token if re.fullmatch(r"[!-~]+", token) else ""  # nothing that a header cannot have
        except (OSError, http.client.HTTPException) as error:
            raise Temporary(
                f"{self.url}: its token service {shown_url(url)}: {error or type(error).__name__}"
            ) from error
        except (ValueError, AttributeError):
            return ""
        finally:
            connection.close()


class _Unauthorized(Permanent):
    """HTTP 401. `headers`: of the answer, with its challenge."""

    code = "permission-denied"

    def __init__(self, message: str, headers: Any) -> None:
        super().__init__(message)
        self.headers = headers


def layer_of(path: str, size: int, data: Iterable[bytes]) -> Layer:
    """Return the layer of a file from its bytes."""
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    kind = WEIGHT if path.endswith(_WEIGHTS) else OTHER
    return Layer(path, size, f"sha256:{digest.hexdigest()}", kind)
