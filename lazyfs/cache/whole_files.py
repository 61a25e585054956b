"""Tell which files of a mount were verified as a whole, by the digest that their source gives.

A chunk of such a file has no digest of its own and is served before the file is complete. What depends on the bytes that
were read (a snapshot, a recorded digest) waits until all files are verified.
"""

from __future__ import annotations

from typing import Any

from lazyfs.cache.cache import Cache
from lazyfs.content.manifest import Manifest
from lazyfs.content.whole_file import has_digest


class WholeFiles:
    """The files of one mount of which the source gives a digest. Any process may verify them: the cache holds the state."""

    def __init__(self, manifest: Manifest, cache: Cache) -> None:
        self._cache = cache
        self._files = {i: f for i, f in enumerate(manifest.files) if f.size and has_digest(f)}
        self._before = {index: cache.revoked(file) for index, file in self._files.items()}
        self._wrong: set[int] = set()

    def unverified(self) -> list[int]:
        """Return the files that are not known to be what the source says."""
        return [index for index, file in self._files.items() if not self._cache.verified_whole(file)]

    def wrong(self) -> list[int]:
        """Return the files of which wrong bytes may have been read through this mount, even if they are right by now."""
        self._wrong |= {i for i, file in self._files.items() if self._cache.revoked(file) != self._before[i]}
        return sorted(self._wrong)

    def state(self) -> dict[str, Any]:
        """Return both by path."""
        # In this order: a file that is revoked between the two is in one of them.
        unverified = [self._files[index].path for index in self.unverified()]
        return {"unverified": unverified, "wrong": [self._files[index].path for index in self.wrong()]}
