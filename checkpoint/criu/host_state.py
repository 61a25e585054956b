"""Remove from the images what belongs to the host of the dump, so that a restored engine has that of its own host.

- Modes of files and folders that were open or mapped. CRIU refuses one that has changed, and a mode is no content; size and build id
  stay, by which CRIU notices another file.
- oom_score_adj, which a container's runtime chooses, and the login uid, which CRIU may not set in another session. Without
  them a process inherits its launcher's.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from checkpoint.criu.images import Message, decode, encode, framed, head_size, payloads
from checkpoint.errors import Failed

_Shorten = Callable[[Message], bool]
_REG, _MODE = 3, 10
"""A file of a file entry, and its mode (CRIU's images/fdinfo.proto, regfile.proto)."""
_TASK, _LOGIN_UID, _OOM_SCORE_ADJ = 3, 13, 14
"""A task of a core entry, and two of its fields (CRIU's images/core.proto)."""


def forget(images: Path) -> None:
    """Rewrite the images without what belongs to this host. Raises OSError, Failed (criu-dump-failed) if one is malformed."""
    try:
        _rewrite(images / "files.img", _without_mode)
        for core in images.glob("core-*.img"):
            _rewrite(core, _without_inherited)
    except (ValueError, IndexError, struct.error) as error:
        raise Failed("criu-dump-failed", f"CRIU wrote an image that cannot be read: {error}") from error


def _rewrite(path: Path, shorten: _Shorten) -> None:
    data = path.read_bytes()
    entries = [decode(payload) for payload in payloads(data)]
    if sum(shorten(entry) for entry in entries):
        path.write_bytes(data[: head_size(data)] + b"".join(framed(encode(entry)) for entry in entries))


def _without_mode(entry: Message) -> bool:
    def old(file: Message) -> bool:
        mode = file.get(_MODE, [0])[-1]
        return isinstance(mode, int) and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))

    return _remove(entry, _REG, lambda file: (_MODE,) if old(file) else ())


def _without_inherited(entry: Message) -> bool:
    return _remove(entry, _TASK, lambda _: (_LOGIN_UID, _OOM_SCORE_ADJ))


def _remove(entry: Message, inside: int, which: Callable[[Message], Iterable[int]]) -> bool:
    """Remove fields of the messages `inside` an entry; return whether one was there."""
    found = False
    for index, value in enumerate(entry.get(inside, [])):
        if isinstance(value, bytes):
            message = decode(value)
            gone = [field for field in which(message) if message.pop(field, None) is not None]
            if gone:
                entry[inside][index], found = encode(message), True
    return found
