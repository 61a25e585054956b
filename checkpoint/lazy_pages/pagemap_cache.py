"""The page maps of a snapshot, read from CRIU's images once and kept as `.verified-pages` in its folder: 2 ms instead of 60.

What is kept says for which image files it holds (device, inode, size, mtime, ctime) and carries a digest of itself, since a wrong
offset would put wrong bytes in place. Where anything differs, the images are read again. The name begins as the verification ledger's
does: it is this host's own, and no archive takes it along or brings it. Standard library only.
"""

from __future__ import annotations

import os
from threading import get_ident

try:
    from _blake2 import blake2b as blake2b
except ImportError:
    from hashlib import blake2b as blake2b  # the same, and with it OpenSSL: 4 ms that a restore waits for

from checkpoint.criu.pagemap import ProcessImage, process_ids, read_process
from checkpoint.lazy_pages import cache_file

FILE_NAME = ".verified-pages"
_VERSION = 4


def read(images: str) -> tuple[dict[int, ProcessImage], bool]:
    """The page map of every process in a folder of images, and whether it came from the kept index.

    Raises images.BadImage, or OSError where a file is missing.
    """
    known = _known(images)
    if known is not None:
        return known, True
    return {pid: read_process(images, pid) for pid in process_ids(images)}, False


def keep(images: str, found: dict[int, ProcessImage]) -> OSError | None:
    """Keep what `read` returned for the next restore; why it was not kept, where it was not. Then the images are read again."""
    processes, sections = [], []
    for image in found.values():
        processes.append([image.pid, image.pages_file])
        sections += [cache_file.flat(runs) for runs in (image.runs, image.mapped, image.eager, image.wiped_on_fork)]
        sections.append(cache_file.flat([image.borders]))
    head = {"version": _VERSION, "images": stamps(images), "processes": processes}
    return write(images, FILE_NAME, cache_file.packed(head, sections))


def write(images: str, name: str, body: bytes) -> OSError | None:
    """Keep `body` as a file beside the folder of images, whole or not at all; why it was not kept, where it was not."""
    target = path(images, name)
    new = f"{target}.{os.getpid()}.{get_ident()}"  # one process may serve several trees
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(blake2b(body).digest() + body)
            os.replace(new, target)
        except OSError:
            os.unlink(new)
            raise
    except OSError as error:
        return error
    return None


def checked(images: str, name: str) -> memoryview:
    """What `write` kept. Raises OSError where there is none, ValueError where it is damaged."""
    with open(path(images, name), "rb") as file:
        data = file.read()
    body = memoryview(data)[64:]
    if blake2b(body).digest() != data[:64]:
        raise ValueError(f"{name} is damaged")
    return body


def _known(images: str) -> dict[int, ProcessImage] | None:
    try:
        head, sections = cache_file.unpacked(checked(images, FILE_NAME))
        if head["version"] != _VERSION or not same(head["images"], stamps(images)):
            return None
        found = {}
        parts = iter(sections)
        for pid, pages_file in head["processes"]:
            image = found[int(pid)] = ProcessImage(int(pid), cache_file.pages_file(pages_file))
            image.runs, image.mapped, image.eager = (cache_file.triples(next(parts)) for _ in range(3))
            image.wiped_on_fork, image.borders = cache_file.pairs(next(parts)), cache_file.numbers(next(parts)).tolist()
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None  # none yet, of another version, or damaged
    return found


def same(kept_stamps: object, now: list[tuple[str, int, int, int, int, int]]) -> bool:
    """Whether stamps that were kept are those of the files as they are now."""
    return kept_stamps == [list(stamp) for stamp in now]


def path(images: str, name: str) -> str:
    """Of what is kept beside a folder of images."""
    return os.path.join(os.path.dirname(images.rstrip("/")), name)


def stamps(images: str) -> list[tuple[str, int, int, int, int, int]]:
    """Which files were read: those that say where pages lie."""
    found = []
    with os.scandir(images) as entries:
        for entry in entries:
            if entry.name.startswith(("pagemap-", "mm-")):
                info = entry.stat()
                found.append((entry.name, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    return sorted(found)
