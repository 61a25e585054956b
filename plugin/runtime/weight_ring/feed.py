"""One restore's weights: read from the moment the restore is decided, offered to the engine when it is back.

Never wrong, never worse: whatever fails here, from a layout that the engine declined to a file that cannot be read, the engine
reloads its weights itself, as it would without a ring, and one line says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import Failed
from checkpoint.host_memory import room
from launchers.control import WEIGHTS_SOCKET as SOCKET
from plugin.runtime.weight_ring import layout as layouts
from plugin.runtime.weight_ring.ring import SLOT_BYTES, SLOTS, Ring, Source

if TYPE_CHECKING:
    from plugin.runtime.phases import PhaseTracker

log = logging.getLogger("quickthaw")
OFF = ".weight-ring-off"
"""File in a snapshot's folder, this host's own: the ring's weights once gave another answer than the engine's own reload."""
STALL_S = 20.0
"""Maximum seconds for one slot; the engine waits longer (plugin/engine/weights.py)."""
LEAST_SLOTS = 2
WEIGHTS, AHEAD = "weights", "weights-ahead"
"""Names in PhaseTracker.work: from the first byte read to the last; and to the last one read before the engine took any."""


class WeightFeed:
    """The ring of one restore. Use it as a context manager; begin it once."""

    def __init__(self, tracker: PhaseTracker) -> None:
        self._tracker = tracker
        self._lock = threading.Lock()
        self._closed = False
        self._begun = threading.Event()
        self._ring: Ring | None = None
        self._digest = ""
        self._listener: socket.socket | None = None
        self._peer: socket.socket | None = None
        self._control: Path | None = None
        self._folder: Path | None = None

    def __enter__(self) -> WeightFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ring(self) -> Ring | None:
        """The ring, while it is filled or offered."""
        return self._ring

    def begin(self, folder: Path, place: str, here: Path | None) -> bool:
        """Begin to read the weights of the snapshot in `folder`; return whether the engine will find them in the ring.

        `place` is the model's folder as the engine sees it, `here` where this host has it.
        """
        return self._begin(folder, place, lambda: here)

    def begin_later(self, folder: Path, place: str, mount: Callable[[], Path | None]) -> None:
        """Begin as soon as `mount`, called in a thread, has returned where this host has the model."""
        threading.Thread(target=self._begin, args=(folder, place, mount), name="weights", daemon=True).start()

    def _begin(self, folder: Path, place: str, find: Callable[[], Path | None]) -> bool:
        try:
            here = find()
            layout = None if (folder / OFF).exists() else layouts.load(folder)
            if layout is None:
                return False
            with self._lock:
                if not self._closed:
                    self._folder, self._digest = folder, layout.digest
                    ring = _ring(folder, layout, place, here)
                    ring.start()
                    self._ring = ring
            return True
        except (Failed, OSError) as error:
            log.warning("the engine reads its weights itself: %s", _words(error))
            return False
        finally:
            self._begun.set()

    def offer(self, control: Path) -> None:
        """Offer the ring to the engine whose control folder this is, until `close`."""
        if not self._begun.wait(STALL_S):
            log.warning("the engine reads its weights itself: weights-stalled: no mount within %.0f s", STALL_S)
            self.close()
            return
        ring = self._ring
        if ring is None:
            return
        self._control = control
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            (control / SOCKET).unlink(missing_ok=True)
            listener.bind(os.fspath(control / SOCKET))
            listener.listen(1)
        except OSError as error:
            listener.close()
            log.warning("the engine reads its weights itself: weights-ring: %s", error)
            self.close()
            return
        self._listener = listener
        threading.Thread(target=self._serve, args=(listener, ring), name="weights-serve", daemon=True).start()

    def settle(self) -> bool:
        """Log what became of the offer, once the engine has reloaded its weights; return whether they came from the ring."""
        ring, control = self._ring, self._control
        if ring is None or control is None:
            return False
        taken = False
        for note in control.glob("*.refilled"):
            try:
                answer = json.loads(note.read_text())
                note.unlink()
            except (OSError, ValueError) as error:
                answer = {"failed": f"weights-ring: {error}"}
            if answer["failed"]:
                log.warning("the engine read its weights itself: %s", answer["failed"])
                continue
            taken = True
            ahead, until = ring.ahead
            log.info(
                "weights: %.2f GB taken in %.2f s, of which %.2f s waiting; %.2f GB were read beside the restore, in %.2f s",
                answer["bytes"] / 1e9,
                answer["seconds"],
                answer["waited"],
                ahead / 1e9,
                max(0.0, until - ring.began),
            )
        self.close()
        return taken

    def distrust(self) -> None:
        """Use no ring for this snapshot any more on this host."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # it is found out again at the next restore
                (self._folder / OFF).touch(mode=0o600)

    def close(self) -> None:
        """Withdraw the offer and give the memory back. Idempotent."""
        with self._lock:
            self._closed = True
            ring, self._ring = self._ring, None
        listener, self._listener = self._listener, None
        if listener is not None:
            assert self._control is not None
            with contextlib.suppress(OSError):  # the sandbox may be gone
                (self._control / SOCKET).unlink(missing_ok=True)
            for end in (listener, self._peer):
                with contextlib.suppress(OSError):  # wakes the thread that serves it
                    if end is not None:
                        end.shutdown(socket.SHUT_RDWR)
            listener.close()
        if ring is not None:
            if ring.ahead[0]:
                self._tracker.worked(AHEAD, ring.began, ring.ahead[1])
            self._tracker.worked(WEIGHTS, ring.began, ring.ended or time.monotonic())
            ring.close()

    def _serve(self, listener: socket.socket, ring: Ring) -> None:
        """Serve the one engine that connects."""
        try:
            peer, _ = listener.accept()
        except OSError:
            return  # withdrawn
        head = {"layout": self._digest, "slots": ring.slots, "slot_bytes": ring.slot_bytes}
        with peer:
            try:
                with self._lock:  # `close` closes the ring's descriptor, and shuts down only a peer that it knows
                    if self._closed:
                        return
                    self._peer = peer
                    socket.send_fds(peer, [json.dumps(head).encode()], [ring.fd])
            except OSError:
                return  # the engine ended
            freed = threading.Thread(target=_receive_freed, args=(peer, ring), name="weights-freed", daemon=True)
            freed.start()
            with contextlib.suppress(OSError):  # the engine ended, or closed its end: its answer says why
                for number in range(ring.count):
                    size = ring.wait_filled(number, STALL_S)
                    message = {"number": number, "bytes": size} if size else {"error": ring.error or _STALLED}
                    peer.send(json.dumps(message).encode())
                    if not size:
                        break
            freed.join()  # until the engine has closed its end


_STALLED = f"weights-stalled: no more bytes came within {STALL_S:.0f} s"


def _receive_freed(peer: socket.socket, ring: Ring) -> None:
    """Free the slots that the engine names, until it closes its end."""
    with contextlib.suppress(OSError):
        while data := peer.recv(1 << 16):
            for (number,) in struct.iter_unpack("q", data):
                ring.free(number)


def _ring(folder: Path, layout: layouts.Layout, place: str, here: Path | None) -> Ring:
    """Open all files of a layout and make their ring. Raises Failed (weights-memory-short, weights-unreadable), OSError."""
    recorded = layout.recorded
    slots = _slots(recorded.total)
    opened: dict[int, Source] = {}
    try:
        for number, (path, size) in enumerate(recorded.files):
            inside = bool(place) and Path(path).is_relative_to(place)
            if inside and here is None:
                raise Failed("weights-unreadable", f"this host has no {path}")
            opened[number] = Source(here / Path(path).relative_to(place) if inside and here else path, size)
        if recorded.own:
            opened[layouts.OWN] = Source(folder / layouts.FOLDER / layouts.SIDE, recorded.own)
        return Ring(opened, recorded.segments, slots, SLOT_BYTES)
    except BaseException:
        for source in opened.values():
            source.close()
        raise


def _slots(total: int) -> int:
    """Return how many slots the host's memory allows. Raises Failed (weights-memory-short)."""
    wanted = min(SLOTS, -(-total // SLOT_BYTES))
    try:
        found = room()
    except (OSError, LookupError, ValueError):
        return wanted  # this host does not say
    slots = min(wanted, (found.available - found.margin) // SLOT_BYTES)
    if slots < min(wanted, LEAST_SLOTS):
        raise Failed(
            "weights-memory-short",
            f"{found.available >> 20} MiB of host memory are available, too few for {LEAST_SLOTS} slots of {SLOT_BYTES >> 20} MiB",
        )
    return slots


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"weights-unreadable: {error.filename}: {error.strerror or error}"
    return str(error)
