"""The engine's own output: passed on to ours as it comes, with the last lines kept for an error message."""

from __future__ import annotations

import collections
import contextlib
import os
import threading


class Output:
    """One pipe from an engine. `target` is a descriptor of ours, or None to keep only the last lines; `pipe` its ends, where there is one.

    The write end goes to the engine and must be closed here once it has it; the read end closes at the engine's end.
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
                self._target = None  # nobody listens any more; the engine must not block on that

    def handed_over(self) -> None:
        """The engine has its end: close ours, so that reading ends when the engine does."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def last(self, count: int = 3) -> str:
        """The last lines as one line of text, for an error message; errors before anything else."""
        self._thread.join(0.2)
        lines = [line.decode(errors="replace").strip() for line in self._lines]
        telling = [line for line in lines if "Error" in line or "error:" in line]
        chosen = (telling or lines)[-count:] if not telling else telling[-1:]
        return " | ".join(chosen)[-400:] or "(it wrote nothing)"
