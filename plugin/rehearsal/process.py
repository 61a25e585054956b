"""The process that rehearses for a launch: `python -m plugin.rehearsal.process`, at the lowest priority.

Its standard input carries one line, an `Order` in JSON, and then the bytes PAUSE and GO_ON. It stays open for as long
as the launch wants the result: when it closes, however the launch ended, everything here ends at once. Its standard
output carries one `Report` a line.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lazyfs.content.records import ready
from plugin.rehearsal import priority

if TYPE_CHECKING:
    from plugin.rehearsal.rehearse import Rehearsal

PAUSE, GO_ON = b"p", b"c"
CUT_SHORT = 3
"""The exit code of a process that could not end its sandbox in order: its files are left."""
END_LIMIT_S = 3.0
"""Seconds after the end of standard input in which the sandbox is ended in order; afterwards the process's end ends it."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to rehearse, and with what the launch restores it itself. `push_to`: the store to push it to afterwards, or ""."""

    home: str
    name: str
    engine_python: str = ""
    api_key: str | None = None
    admin_key: str | None = None
    lazy_restore: bool = True
    verify: str = "auto"
    trust_keys: list[str] = []
    store_url: str | None = None
    push_to: str = ""
    sign_key: str = ""


class Report(msgspec.Struct, frozen=True):
    """What came of one step: `event` is rehearsed, pushed, failed (the snapshot is in quarantine) or given-up.

    `code` and `message` say why; `bytes` were written to the store.
    """

    event: str
    code: str = ""
    message: str = ""
    bytes: int = 0


def _say(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def main() -> int:
    """Rehearse as ordered. Returns 0 when the snapshot is rehearsed, and pushed if that was ordered, else 1."""
    priority.lower_own()
    try:
        # Without a buffer: the thread that reads it holds no lock of it when the interpreter ends, which would abort.
        return _rehearse(io.FileIO(0, closefd=False))
    finally:
        priority.leave_group()


def _rehearse(words: io.RawIOBase | io.BytesIO) -> int:
    order = msgspec.json.decode(words.readline(), type=ready(Order))

    from checkpoint import disk
    from checkpoint.errors import CheckpointError
    from checkpoint.snapshot.library import Library
    from plugin.rehearsal.rehearse import GivenUp, Rehearsal, RehearsalFailed, named_settings

    home = Path(order.home)
    try:
        found = Library(home).load(order.name)
        settings = named_settings(
            found,
            home,
            order.engine_python,
            api_key=order.api_key,
            admin_key=order.admin_key,
            lazy_restore=order.lazy_restore,
            verify=order.verify,
            trust_keys=tuple(map(Path, order.trust_keys)),
            store_url=order.store_url,
        )
        one = Rehearsal(settings)
        threading.Thread(target=_obey, args=(one, words), name="owner", daemon=True).start()
        one.run()
        _say(Report("rehearsed"))
        if order.push_to:
            from plugin.rehearsal.push import push

            done = push(Library(home), order.name, order.push_to, order.sign_key)
            _say(Report("pushed", bytes=done))
    except RehearsalFailed as error:
        _say(Report("failed", error.code, str(error.args[0])))
        return 1
    except (GivenUp, CheckpointError, OSError) as error:
        # An OSError here is of a file of this host, as of the mark, whatever the snapshot is.
        known = (
            disk.failure(f"{order.name} is not rehearsed", error, "host-io") if isinstance(error, OSError) else error
        )
        _say(Report("given-up", known.code, str(known.args[0])))
        return 1
    return 0


def _obey(one: Rehearsal, words: io.FileIO) -> None:
    """Pause and go on as standard input (`words`) says, and end everything when it closes."""
    while word := words.read(1):
        one.pause(word == PAUSE)
    if not one.over:
        one.end("launch-ended", "the launch that asked for it does not wait any more")
        time.sleep(END_LIMIT_S)
    os._exit(CUT_SHORT)


if __name__ == "__main__":
    sys.exit(main())
