"""Sign snapshot manifests with Ed25519, and check that a trusted key signed a snapshot from a shared store.

The manifest names every file by digest and lists what may restore it, so its signature covers the whole snapshot.
`manifest.sig` beside it holds the signatures (`lazyfs.signing`, which signs the manifests of weights, too).

With a trust key set, `check` raises Integrity (signature-missing) if there is no signature, and Integrity
(signature-wrong) if no signature over these bytes is by a trusted key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lazyfs.errors
from checkpoint.errors import Failed, Integrity
from lazyfs import signing

FILE_NAME = "manifest.sig"
_PREFIX = b"quickthaw snapshot manifest 1\0"


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise errors of the shared code as those of this package."""
    try:
        yield
    except lazyfs.errors.Integrity as error:
        raise Integrity(error.code, str(error)) from error
    except lazyfs.errors.LazyfsError as error:
        raise Failed(error.code, str(error)) from error


def keygen(private: Path, public: Path | None = None) -> str:
    """Write a new key pair: `private` (0600) and `public` (default: `private` plus `.pub`).

    Return the key's id.

    Raises Failed when one of the files exists or cannot be written; then neither file is left.
    """
    with _own_errors():
        return signing.keygen(private, public)


def signer(private: Path) -> Callable[[bytes], bytes]:
    """Return a function that maps a manifest's bytes to the content of its `manifest.sig`.

    Raises Failed at once, not at the signing, when the key cannot be used: key-unreadable, key-too-open,
    key-wrong-kind.
    """
    with _own_errors():
        return signing.signer(private, _PREFIX)


def check(manifest: bytes, signatures: bytes | None, trusted: Sequence[Path]) -> str:
    """Return the id of the trusted key that signed these bytes.

    `signatures` is the content of `manifest.sig`, or None.

    Raises Integrity (signature-missing, signature-wrong), or Failed when a trust key cannot be read.
    """
    with _own_errors():
        return signing.check(
            manifest, signatures, trusted, prefix=_PREFIX, what="the snapshot", again="pull the snapshot again"
        )


def check_folder(folder: Path, trusted: Sequence[Path]) -> bytes:
    """Return the bytes of a snapshot folder's manifest if a trusted key signed exactly these bytes.

    Raises the same errors as `check`.
    """
    from checkpoint.snapshot.manifest import FILE_NAME as MANIFEST

    try:
        manifest = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise Integrity(
            "manifest-unreadable",
            f"{folder / MANIFEST}: {error.strerror}; remove it: quickthaw snapshot rm {folder.name}",
        ) from error
    try:
        signatures = (folder / FILE_NAME).read_bytes()
    except FileNotFoundError:
        signatures = None
    except OSError as error:
        raise Integrity("signature-missing", f"{folder / FILE_NAME}: {error.strerror}") from error
    check(manifest, signatures, trusted)
    return manifest
