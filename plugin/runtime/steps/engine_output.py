"""Copy the engine's output to this process's own as it arrives, and keep the last lines for error messages."""

from __future__ import annotations

import collections
import contextlib
import os
import threading


class Output:
    """Pump one pipe from an engine. `target` is a file descriptor to copy to, or None to keep only the last lines.

    `pipe` is an existing (read, write) pair. The engine inherits the write end; call `close_write_end` once it has. The
    read end is closed when the engine ends.
    """

    def __init__(self, target: int | None, keep: int = 60, pipe: tuple[int, int] | None = None) -> None:
        self.read_fd, self.write_fd = pipe or os.pipe()
        self.name = os.readlink(f"/proc/self/fd/{self.write_fd}")
        self._target = target
        self._lines: collections.deque[bytes] = collections.deque(maxlen=keep)
        self._rest = b""
        self._thread = threading.Thread(target=self._pump, name="engine-output", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.read_fd, 65536):
                *lines, self._rest = (self._rest + data)[-65536:].split(b"\n")
                self._lines.extend(line for line in lines if line.strip())
                if self._target is not None:
                    self._write(data)
        os.close(self.read_fd)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and self._target is not None:
            try:
                view = view[os.write(self._target, view) :]
            except OSError:
                self._target = None  # the reader is gone; the engine must not block on it

    def close_write_end(self) -> None:
        """Close this process's write end, so that the pipe reports EOF when the engine ends."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def last(self, count: int = 3) -> str:
        """Return the last `count` lines joined into one, or the last line that names an error, for an error message."""
        self._thread.join(0.2)
        lines = [line.decode(errors="replace").strip() for line in self._lines]
        telling = [line for line in lines if "Error" in line or "error:" in line]
        chosen = (telling or lines)[-count:] if not telling else telling[-1:]
        return " | ".join(chosen)[-400:] or "(it wrote nothing)"
