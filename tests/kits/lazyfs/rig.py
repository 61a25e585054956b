"""Mounts for lazyfs's tests. They are read from another process only, and removed through the kernel if necessary."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.errors import NotFound
from lazyfs.mount import kernel
from lazyfs.mount.client import MountHandle, mount
from tests.kits.lazyfs.models import write_safetensors

ROOT = Path(__file__).resolve().parents[3]
# Generous, since a loaded CI machine is slow; a wait that ends sooner costs nothing.
LIMIT_S = 60
# Tensors of the tests' model: smaller and larger than a chunk.
SIZES = [1000, 5 << 20, 70_001, 2 << 20, 3 << 20, 9 << 20]
# Both transports carry the same service; test-fast runs the one that root gets.
TRANSPORTS = ["raw", pytest.param("pyfuse3", marks=pytest.mark.slow)]
both = pytest.mark.parametrize("transport", TRANSPORTS)

# Runs in a process of its own and answers one JSON line per request. If the process that controls the mount read it,
# a blocked read could never be aborted.
READER = r"""
import json, mmap, os, sys, hashlib
fds, maps = {}, {}
for line in sys.stdin:
    name, args = json.loads(line)
    try:
        if name == "open":
            fds[args[0]] = os.open(args[1], os.O_RDONLY); out = True
        elif name == "close":
            maps.pop(args[0], None); os.close(fds.pop(args[0])); out = True
        elif name == "pread":
            out = os.pread(fds[args[0]], args[2], args[1]).hex()
        elif name == "mmap":
            m = maps.get(args[0])
            if m is None:
                m = maps[args[0]] = mmap.mmap(fds[args[0]], 0, prot=mmap.PROT_READ)
            out = m[args[1]:args[1] + args[2]].hex()
        elif name == "digest":
            h = hashlib.blake2b()
            with open(args[0], "rb") as f:
                while part := f.read(1 << 20):
                    h.update(part)
            out = h.hexdigest()
        elif name == "call":
            out = eval(args[0], {"os": os})
    except OSError as e:
        out = {"errno": e.errno}
    print(json.dumps(out), flush=True)
"""


class Reader:
    """A process that reads on request. `ask` raises TimeoutError instead of blocking forever."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def send(self, name: str, *args: object) -> None:
        self.process.stdin.write(json.dumps([name, args]) + "\n")
        self.process.stdin.flush()

    def receive(self, limit_s: float = LIMIT_S) -> object:
        import select

        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            raise TimeoutError("the reader did not answer")
        return json.loads(self.process.stdout.readline())

    def ask(self, name: str, *args: object, limit_s: float = LIMIT_S) -> object:
        self.send(name, *args)
        return self.receive(limit_s)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
        self.process.stdin.close()
        self.process.stdout.close()


class Rig:
    """Mounts and readers of one test. `close` removes all of them, if necessary by the kernel's abort."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.handles: list[MountHandle] = []
        self.readers: list[Reader] = []
        self.devices: dict[str, int] = {}

    def mount(self, digest: str, name: str = "mnt", **settings: object) -> MountHandle:
        handle = mount(digest, self.tmp / name, ready_timeout_s=LIMIT_S, **settings)
        self.handles.append(handle)
        entry = kernel.mount_at(str(handle.mountpoint))
        if entry is not None:
            self.devices[entry.device] = handle.pid
        return handle

    def reader(self) -> Reader:
        self.readers.append(Reader())
        return self.readers[-1]

    def fetcher_of(self, handle: MountHandle) -> int:
        """Wait for the daemon's fetcher and return its PID."""
        return wait_for(lambda: fetcher_pid(handle.pid))

    def close(self) -> None:
        for reader in self.readers:
            reader.process.kill()  # one that waits for a stalled mount ends when that is aborted
        for handle in self.handles:
            while kernel.mount_at(str(handle.mountpoint)) is not None:
                with contextlib.suppress(NotFound):  # its daemon, which ends, was first
                    kernel.unmount(str(handle.mountpoint), lazy=True)
        for handle in self.handles:
            if not ends(handle.pid, 1):
                # Something still holds the mount (a reader that waits, another test's sandbox), so its number is its own.
                # Any earlier it may be that of another test's mount by now: the kernel uses numbers again.
                for device in [device for device, daemon in self.devices.items() if daemon == handle.pid]:
                    kernel.abort(device)
                if not ends(handle.pid, 10):
                    os.kill(handle.pid, signal.SIGKILL)
        for reader in self.readers:
            reader.close()


@contextlib.contextmanager
def copied_namespace():
    """Start a process in its own mount namespace, which keeps a copy of every mount, as a sandbox does. Return its
    PID.
    """
    # The shell prints "ready" after the copy.
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as inner:
        try:
            assert inner.stdout.readline() == "ready\n"
            yield inner.pid
        finally:
            inner.kill()


def fetcher_pid(daemon: int) -> int | None:
    try:
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
        tasks = Path(f"/proc/{daemon}/task").iterdir()
        children = [c for t in tasks for c in (t / "children").read_text().split()]
    except FileNotFoundError:
        return None
    for child in children:
        with contextlib.suppress(OSError):
            if b"lazyfs.fetch.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def is_daemon(pid: int) -> bool:
    try:
        return b"lazyfs.mount.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(daemon: int, limit_s: float) -> bool:
    """Wait until a daemon has ended. Return False if it has not within `limit_s`."""
    try:
        wait_for(lambda: not is_daemon(daemon), limit_s=limit_s)
    except AssertionError:
        return False
    return True


def wait_for(check, *, limit_s: float = LIMIT_S):
    """Poll until `check()` is true and return its value. Fails after the limit."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = check()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("what was waited for did not happen")


def write_model(folder: Path, sizes: list[int], seed: int = 1) -> Path:
    """Write a model directory: a safetensors file with tensors of these sizes, and two small files."""
    rng = random.Random(seed)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {f"t{i}": rng.randbytes(size) for i, size in enumerate(sizes)})
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_bytes(rng.randbytes(100_000))
    (folder / "link").symlink_to("sub/tokenizer.json")
    (folder / "empty").touch()
    return folder


def assert_same(reader, model, mountpoint):
    """Assert that every file of a model has the same bytes below the mount point."""
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        there = mountpoint / path.relative_to(model)
        assert (path, reader.ask("digest", str(there))) == (path, reader.ask("digest", str(path)))


def digest_or_errno(reader, path):
    answer = reader.ask("digest", str(path))
    return answer["errno"] if isinstance(answer, dict) else answer
