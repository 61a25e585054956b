"""Identify a model by the content of its files: a sketch in milliseconds, and a digest of every byte when it is needed.

The sketch covers names, sizes, the content of small files, and samples of large ones (their first bytes, where formats
keep their headers, and SAMPLES places more). It selects a snapshot. The digest covers every byte. It proves that a
snapshot's model is this one, so a restore waits for it; a cold start does not, and computes it while the engine reads the
same files. Neither copies a file. Modes and owners are not content.

Both are kept per file in one index in the state folder, under the fields that the kernel changes on any write: size, mtime,
ctime and inode. Equal fields mean equal content, with git's caveat: a file changed less than RACY_NS before it was looked
at could change again within the same tick of the clock, so `ModelFiles` waits that long.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import blake3

from checkpoint.errors import Incompatible
from checkpoint.files import RACY_NS, private_folder, write_private
from lazyfs.paths import fingerprint

INDEX = "model-digests.json"
SMALL = 64 << 10
"""Files up to this many bytes count in the sketch by all of their content."""
SAMPLES, SAMPLE_BYTES = 8, 4 << 10
_BUFFER = 8 << 20
_DEPTH = 32
_KEPT = 16384
_FORMAT = 1
_SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5}\.gguf)")
_BESIDE = re.compile(r".*\.(json|jinja|model|txt|py|tiktoken)|(?i:mmproj).*\.gguf")
"""Files beside a model of one file (GGUF) that engines read: its configuration, tokenizer, and projector."""
_NOT_READ = frozenset({".git", "__pycache__", ".cache"})
"""Folders of a model that no engine reads: version control, compiled code, the hub's notes on a download."""

Fingerprint = list[int]
"""Size, mtime_ns, ctime_ns, inode. Not the device, whose number changes with each container."""


class _File(NamedTuple):
    key: str
    """The file itself, links resolved: two revisions of a hub model share their files."""
    fingerprint: Fingerprint


class _Known(NamedTuple):
    fingerprint: Fingerprint
    sample: str
    digest: str = ""


class ModelFiles:
    """The files of one model directory, or of one model file, as they are when this object is made.

    Raises OSError if they cannot be listed. Threads may share it.
    """

    def __init__(self, path: Path, home: Path, keep: Callable[[], bool] = lambda: True) -> None:
        """`keep`: whether what was found may be kept in the index now; called before each write of it."""
        self.path, self.index, self._keep = path, home / INDEX, keep
        self.files, self.links = self._settled()
        self._lock = threading.Lock()
        self._known = {key: known for key, known in _load(self.index).items() if key in self._keys}
        self._new: dict[str, _Known] = {}
        self._sketch = self._digest = ""

    @property
    def size(self) -> int:
        """Total bytes of all files."""
        return sum(file.fingerprint[0] for file in self.files.values())

    @property
    def _keys(self) -> set[str]:
        return {file.key for file in self.files.values()}

    def sketch(self) -> str:
        """Return 32 hex digits that differ for models of other files, sizes, headers or sampled bytes.

        Raises OSError; Incompatible (inputs-changed) if a file changes meanwhile.
        """
        with self._lock:
            if not self._sketch:
                samples = {name: self._sample(file) for name, file in self.files.items()}
                self._sketch = self._over(b"quickthaw model sketch 1\0", samples)[:32]
                self._save()
            return self._sketch

    def known_digest(self) -> str:
        """Return the digest if no file must be read for it, else ""."""
        if not self._digest and all(self._digest_of(file) for file in self.files.values()):
            digests = {name: self._digest_of(file) for name, file in self.files.items()}
            self._digest = self._over(b"quickthaw model 1\0", digests)
        return self._digest

    def digest(self, threads: int = blake3.blake3.AUTO, stop: Callable[[], bool] = lambda: False) -> str:
        """Return 64 hex digits that prove the content of every file; reads what changed since it was read last.

        `stop` is called between two blocks; if it returns True, the digest is "". Raises OSError; Incompatible (inputs-changed) if a file
        changes meanwhile.
        """
        for file in self.files.values():
            if not self._digest_of(file):
                sample = self._sample(file)
                found = _read(file, threads, stop)
                if not found:
                    return ""
                self._check(file)
                with self._lock:
                    self._new[file.key] = _Known(file.fingerprint, sample, found)
        with self._lock:
            self._save()
        return self.known_digest()

    def unchanged(self) -> bool:
        """Return whether the same files are there with the same fields."""
        try:
            return _list(self.path) == (self.files, self.links)
        except OSError:
            return False

    def _settled(self) -> tuple[dict[str, _File], dict[str, str]]:
        """List the files, once the newest of them can no longer change without a later ctime."""
        found = _list(self.path)
        newest = max((file.fingerprint[2] for file in found[0].values()), default=0)
        wait = newest + RACY_NS - time.time_ns()
        if 0 < wait <= RACY_NS:
            time.sleep(wait / 1e9)
            found = _list(self.path)
        return found

    def _entry(self, file: _File) -> _Known | None:
        known = self._new.get(file.key) or self._known.get(file.key)
        return known if known and known.fingerprint == file.fingerprint else None

    def _digest_of(self, file: _File) -> str:
        known = self._entry(file)
        return known.digest if known else ""

    def _sample(self, file: _File) -> str:
        if known := self._entry(file):
            return known.sample
        size = file.fingerprint[0]
        digest = blake3.blake3()
        with open(file.key, "rb", buffering=0) as opened:
            fd = opened.fileno()
            digest.update(os.pread(fd, SMALL, 0))
            places = range(1, SAMPLES + 1) if size > SMALL else ()
            for place in places:
                digest.update(os.pread(fd, SAMPLE_BYTES, (size - SAMPLE_BYTES) * place // SAMPLES))
        self._check(file)
        sample = digest.hexdigest()
        self._new[file.key] = _Known(file.fingerprint, sample, sample if size <= SMALL else "")
        return sample

    def _check(self, file: _File) -> None:
        if fingerprint(Path(file.key).stat()) != file.fingerprint:
            raise Incompatible(
                "inputs-changed", f"{file.key} was changed while it was read; try again when it is complete"
            )

    def _over(self, what: bytes, content: Mapping[str, str]) -> str:
        digest = blake3.blake3(what)
        for name, file in sorted(self.files.items()):
            digest.update(f"{name}\0{file.fingerprint[0]}\0{content[name]}\n".encode(errors="surrogateescape"))
        for name, target in sorted(self.links.items()):
            digest.update(f"{name}\0link\0{target}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _save(self) -> None:
        """Add what was found to the index. Errors are ignored, because a missing entry only costs time."""
        now = time.time_ns()
        new = {key: known for key, known in self._new.items() if known.fingerprint[2] + RACY_NS <= now}
        if not new or not self._keep():
            return
        with contextlib.suppress(OSError):
            private_folder(self.index.parent)
            with open(self.index.with_suffix(".lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                entries = _load(self.index)
                for key, known in new.items():
                    before = entries.pop(key, None)  # moves the entry to the end, as the newest
                    kept = before if before and before.fingerprint == known.fingerprint and before.digest else known
                    entries[key] = kept
                entries = dict(list(entries.items())[-_KEPT:])
                write_private(self.index, json.dumps({"format": _FORMAT, "files": entries}).encode())


def _list(path: Path) -> tuple[dict[str, _File], dict[str, str]]:
    """Return the files by relative name, links followed, and the targets of links that lead nowhere. Raises OSError."""
    info = path.stat()
    if stat.S_ISREG(info.st_mode):
        return dict(_of_one_file(path)), {}
    files: dict[str, _File] = {}
    links: dict[str, str] = {}
    todo = [(str(path), "", 0)]
    while todo:
        folder, prefix, depth = todo.pop()
        real = os.path.realpath(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                try:
                    info = entry.stat()
                except OSError:
                    if not entry.is_symlink():
                        raise
                    links[name] = str(Path(entry.path).readlink())
                    continue
                if stat.S_ISDIR(info.st_mode):
                    if depth < _DEPTH and entry.name not in _NOT_READ:
                        todo.append((entry.path, f"{name}/", depth + 1))
                elif stat.S_ISREG(info.st_mode):
                    key = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
                    files[name] = _File(key, fingerprint(info))
    return files, links


def _of_one_file(path: Path) -> Iterator[tuple[str, _File]]:
    """Yield a model file, the other shards of it, and the small files beside it that engines read."""
    shards = _SHARD.fullmatch(path.name)
    for entry in os.scandir(path.parent):
        other = shards and (same := _SHARD.fullmatch(entry.name)) and same.groups() == shards.groups()
        if entry.name == path.name or other or _BESIDE.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):
                info = entry.stat()
                if stat.S_ISREG(info.st_mode):
                    yield entry.name, _File(os.path.realpath(entry.path), fingerprint(info))


def _read(file: _File, threads: int, stop: Callable[[], bool]) -> str:
    digest = blake3.blake3(max_threads=threads)
    buffer = bytearray(min(_BUFFER, file.fingerprint[0] + 1))
    view = memoryview(buffer)
    with open(file.key, "rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while read := opened.readinto(buffer):
            if stop():
                return ""
            digest.update(view[:read])
    return digest.hexdigest()


def _load(index: Path) -> dict[str, _Known]:
    """Return the index; empty if it is missing or garbled."""
    try:
        document = json.loads(index.read_bytes())
        if document["format"] != _FORMAT:
            return {}
        return {
            str(key): _Known(list(map(int, found)), str(sample), str(digest))
            for key, (found, sample, digest) in document["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError):
        return {}
