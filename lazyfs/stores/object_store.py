"""Object stores through obstore: S3 and compatible stores, Google Cloud Storage, Azure.

Credentials and endpoints come from the environment and metadata services, as usual in each ecosystem: AWS_ACCESS_KEY_ID,
AWS_PROFILE and AWS_ENDPOINT_URL (with AWS_ALLOW_HTTP for plain HTTP), GOOGLE_APPLICATION_CREDENTIALS,
STORAGE_EMULATOR_HOST, AZURE_STORAGE_ACCOUNT_NAME and so on. obstore's own retries are disabled, so that backoff and limits
are the same for every store.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import obstore
import obstore.exceptions as failures
from obstore.store import from_url

from lazyfs.errors import LazyfsError, NotFound, Permanent, Temporary
from lazyfs.stores.base import MOST_BYTES, ObjectInfo, too_large
from lazyfs.stores.urls import shown_url

# INACTIVITY_S without a byte means a dead connection; WHOLE_S limits one whole request.
INACTIVITY_S, WHOLE_S = 10.0, 60.0
_STATUS = re.compile(r"status(?: code)?:? (\d{3})|\b(4\d\d|5\d\d) [A-Z]", re.IGNORECASE)
# Error texts of S3 and compatible stores, Azure and Google. A response without a body (HEAD) has none of them.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified (bucket|container) does not exist")


def open_url(url: str) -> ObstoreStore:
    """Return the store of an s3://, gs:// or az:// URL."""
    return ObstoreStore(url)


class ObstoreStore:
    """Objects below a bucket's prefix."""

    remote = True

    def __init__(self, url: str) -> None:
        self.url = shown_url(url)
        options: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=INACTIVITY_S),
            "read_timeout": timedelta(seconds=INACTIVITY_S),
            "timeout": timedelta(seconds=WHOLE_S),
        }
        if _allow_http():
            options["allow_http"] = True
        config: dict[str, Any] = {}
        if url.startswith("s3://"):
            # The AWS tools read this variable; obstore reads another one.
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                config["endpoint"] = endpoint
            config["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        if url.startswith("gs://") and emulator:
            # As in Google's client libraries: use the emulator's host, without credentials. "skip_signature" does not
            # suffice: uploads still request a token from the metadata service.
            account = {"gcs_base_url": _emulator_url(emulator), "disable_oauth": True}
            account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
            config = {"service_account_key": json.dumps(account)}
        try:
            self._store: Any = from_url(
                url, config=config or None, client_options=options, retry_config={"max_retries": 0}
            )
        except (failures.BaseError, ValueError) as error:
            raise Permanent(f"cannot open {self.url}: {_first_line(error)}", code="store-config") from error

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
        limit = limit if length is None else length
        options: dict[str, Any] | None = None
        if length is not None or start or version:
            options = {"range": (start, start + length) if length is not None else {"offset": start}}
            if version:
                options["if_match"] = version
        try:
            # A body within the limit arrives as one piece. Anything beyond it is never collected.
            parts = obstore.get(self._store, key, options=options).stream(min_chunk_size=limit + 1)
            body = bytes(next(parts, b""))
            if len(body) <= limit and next(parts, None) is None:
                return body
        except Exception as error:
            raise self._translate(error, f"get {key}") from error
        raise too_large(f"{self.url}/{key}", limit)

    def put(self, key: str, data: bytes | memoryview) -> None:
        try:
            obstore.put(self._store, key, bytes(data), use_multipart=False)
        except Exception as error:
            raise self._translate(error, f"put {key}") from error

    def create(self, key: str, data: bytes) -> bool:
        try:
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except failures.AlreadyExistsError:
            return False
        except Exception as error:
            raise self._translate(error, f"create {key}") from error
        return True

    def head(self, key: str) -> ObjectInfo | None:
        try:
            return _info(obstore.head(self._store, key))
        except Exception as error:
            translated = self._translate(error, f"head {key}")
            if isinstance(translated, NotFound):
                return None
            raise translated from error

    def touch(self, key: str) -> None:
        self.put(key, self.get(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        try:
            for batch in obstore.list(self._store, prefix.rstrip("/") or None, chunk_size=1000):
                for item in batch:
                    yield _info(item)
        except Exception as error:
            raise self._translate(error, f"list {prefix}") from error

    def delete(self, key: str) -> None:
        try:
            obstore.delete(self._store, key)
        except Exception as error:
            translated = self._translate(error, f"delete {key}")
            if not isinstance(translated, NotFound):
                raise translated from error

    def flush(self) -> None:
        return

    def _translate(self, error: Exception, what: str) -> LazyfsError:
        """Return the lazyfs error for an obstore error. Re-raise any other exception, which is a defect."""
        if isinstance(error, LazyfsError):
            return error
        text = f"{self.url}: {what}: {_first_line(error)}"
        if _NO_BUCKET.search(str(error)):
            return Permanent(f"{self.url}: the bucket does not exist; create it or give another", code="no-bucket")
        if isinstance(error, (failures.NotFoundError, FileNotFoundError)):
            return NotFound(text)
        if isinstance(error, failures.PreconditionError):
            return Permanent(f"{text}; the object was replaced, mount it again", code="source-changed")
        if isinstance(error, (failures.PermissionDeniedError, failures.UnauthenticatedError)):
            return Permanent(f"{text}; check the credentials", code="permission-denied")
        if isinstance(error, (failures.InvalidPathError, failures.NotSupportedError)):
            return Permanent(text)
        if not isinstance(error, (failures.BaseError, OSError)):
            raise error
        found = _STATUS.search(str(error))
        status = int(found.group(1) or found.group(2)) if found else 0
        if 400 <= status < 500 and status not in (408, 425, 429):
            return Permanent(text, code="refused")
        return Temporary(text, code="throttled" if status in (429, 503) else "temporary")


def _allow_http() -> bool:
    endpoints = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT")
    plain = any(os.environ.get(e, "").startswith("http://") for e in endpoints)
    plain = plain or _emulator_url(os.environ.get("STORAGE_EMULATOR_HOST", "https://")).startswith("http://")
    return plain or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


def _emulator_url(host: str) -> str:
    return host if "://" in host else f"http://{host}"


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta.get("e_tag") or "")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())[:300]
