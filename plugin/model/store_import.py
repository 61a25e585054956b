"""Import a model into the store that the user named, while its engine serves: a process of its own, at a low priority.

It ends with its launch, however that ends; the next launch goes on where it stopped, since its chunks stay.
`python -m plugin.model.store_import` reads {"parent", "path", "store"} from standard input, with "sign_key" if it is to sign the
manifest, and writes {"error"} or {} to standard output.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from checkpoint.errors import Incompatible
from lazyfs.errors import LazyfsError
from lazyfs.paths import child_environment
from lazyfs.stores.urls import shown_url
from plugin.model.hub_files import HubFiles

log = logging.getLogger("quickthaw")
_PR_SET_PDEATHSIG = 1
_NICE = 10
_VERIFIED_S = 3600.0


class StoreImport:
    """The import of one model's folder into one store. Thread-safe."""

    def __init__(
        self, path: Path, store_url: str, sign_key: Path | None = None, hub_files: HubFiles | None = None
    ) -> None:
        """`hub_files`: what must be verified before it is imported, if the path is the mount of a hub's model."""
        self.path, self.store_url, self.sign_key, self.hub_files = path, store_url, sign_key, hub_files
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._ended = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Start the import, unless it has been started."""
        with self._lock:
            if self._thread is None and not self._ended:
                self._thread = threading.Thread(target=self._log_result, name="store-import", daemon=True)
                self._thread.start()

    def run(self) -> str:
        """Import the model; return why that failed, in one line with a code, or ""; "" if it was ended, too.

        The calling thread must live as long as the import, which the kernel ends with it.
        """
        if self.hub_files:
            try:
                self.hub_files.wait(_VERIFIED_S, lambda: self._ended)
            except Incompatible as error:
                return "" if self._ended else str(error)
        with self._lock:
            if self._ended:
                return ""
            try:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "plugin.model.store_import"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=child_environment(),
                    start_new_session=True,  # an interrupt at the terminal is for the launch
                )
            except OSError as error:
                return f"store-import-failed: {error.strerror or error}"
        request = {"parent": os.getpid(), "path": str(self.path.absolute()), "store": self.store_url}
        if self.sign_key is not None:
            request["sign_key"] = str(self.sign_key.absolute())
        out, _ = process.communicate(json.dumps(request).encode())
        try:
            return str(json.loads(out).get("error", ""))
        except ValueError:
            how = f"it ended with code {process.returncode}; its own output says why"
            return "" if self._ended else f"store-import-failed: {how}"

    def _log_result(self) -> None:
        log.info("importing the model into %s, while the engine serves", shown_url(self.store_url))
        if why := self.run():
            log.warning("%s; the model is not in %s", why, shown_url(self.store_url))
        elif not self._ended:
            log.info("the model is in %s", shown_url(self.store_url))

    def close(self) -> None:
        """End a running import."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None and process.poll() is None:
            process.kill()
        if self._thread is not None:
            self._thread.join(5.0)


def main() -> None:
    """Do the import that standard input names; the kernel ends this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asked = sys.stdin.buffer.read()
    if not asked:
        return  # the parent was killed before it could ask
    request = json.loads(asked)
    if os.getppid() != request["parent"]:
        return  # the parent ended before prctl took effect
    os.nice(_NICE)
    from lazyfs.api import import_directory

    answer: dict[str, str] = {}
    try:
        digest = import_directory(Path(request["path"]), request["store"])
        if "sign_key" in request:
            from lazyfs.content.chunk_store import ChunkStore
            from lazyfs.signing import signer
            from lazyfs.stores import open_store

            ChunkStore(open_store(request["store"])).sign_manifest(digest, signer(Path(request["sign_key"])))
    except LazyfsError as error:
        text = str(error)
        answer["error"] = text if text.startswith(f"{error.code}: ") else f"{error.code}: {text}"
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
