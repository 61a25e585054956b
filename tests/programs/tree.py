"""A small process tree with an engine's features: threads, a listening TCP socket with a kept connection between two
of its processes, POSIX semaphores, shared memory, a deleted open file, a UNIX socket in TMPDIR, an output pipe,
and memory with known contents.

Reads one JSON line per request on port 8000: {"op": "count"} → {"count": n}, one higher each time, …
"""

import ctypes
import json
import mmap
import multiprocessing as mp
import os
import random
import socket
import socketserver
import sys
import tempfile
import threading
import time
from multiprocessing import shared_memory

MAP_NORESERVE = 0x4000  # mmap names it from Python 3.12 on


def worker(address, lock, name):
    """The child: answers over a kept TCP connection, and writes to the shared memory under the semaphore."""
    shared = shared_memory.SharedMemory(name=name)
    with socket.create_connection(address) as sock:
        file = sock.makefile("rwb")
        number = 0
        for line in file:
            with lock:
                number += int(line)
                shared.buf[:8] = number.to_bytes(8, "little")
            file.write(f"{number}\n".encode())
            file.flush()


def main():
    mp.set_start_method("spawn")
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    ballast = mmap.mmap(-1, megabytes << 20)
    # Without reserve: the kernel merges it with no other mapping.
    private = mmap.mmap(-1, megabytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    for offset in range(0, len(ballast), 4096):
        ballast[offset : offset + 8] = private[offset : offset + 8] = offset.to_bytes(8, "little")
    pinned = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    place = (ctypes.c_char * len(pinned)).from_buffer(pinned)
    if ctypes.CDLL(None).mlock(place, ctypes.c_size_t(len(pinned))):
        raise OSError("mlock")
    for offset in range(0, len(pinned), 4096):
        pinned[offset : offset + 8] = (offset + 1).to_bytes(8, "little")
    deleted = tempfile.TemporaryFile()
    deleted.write(b"still here")
    deleted.flush()
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(os.path.join(tempfile.gettempdir(), "tree.sock"))
    unix.listen()
    lock = mp.Lock()
    shared = shared_memory.SharedMemory(create=True, size=4096)
    inner = socket.create_server(("127.0.0.1", 0))
    child = mp.Process(target=worker, args=(inner.getsockname(), lock, shared.name), daemon=True)
    child.start()
    peer = inner.accept()[0].makefile("rwb")
    guard, ticks = threading.Lock(), [0]

    def tick():
        while True:
            time.sleep(0.01)
            ticks[0] += 1

    threading.Thread(target=tick, daemon=True).start()

    def answer(request):
        op = request["op"]
        if op == "count":
            with guard:
                peer.write(b"1\n")
                peer.flush()
                count = int(peer.readline())
            with lock:
                seen = int.from_bytes(bytes(shared.buf[:8]), "little")
            return {"count": count, "shared": seen, "pid": os.getpid()}
        if op == "ballast":
            wrong = sum(
                int.from_bytes(memory[o : o + 8], "little") != o
                for memory in (ballast, private)
                for o in range(0, len(memory), 4096)
            )
            wrong += sum(int.from_bytes(pinned[o : o + 8], "little") != o + 1 for o in range(0, len(pinned), 4096))
            return {"wrong": wrong, "bytes": len(ballast)}
        if op == "deleted":
            deleted.seek(0)
            return {"text": deleted.read().decode()}
        if op == "clock":
            return {"monotonic": time.monotonic(), "ticks": ticks[0]}
        if op == "random":
            return {"random": random.random()}
        if op == "uring":
            libc = ctypes.CDLL(None, use_errno=True)
            return {"result": libc.syscall(425, 8, 0), "errno": ctypes.get_errno()}
        if op == "say":
            print(request["text"], flush=True)
            return {"said": True}
        if op == "exit":
            os._exit(request["code"])
        return {"error": "unknown"}

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(json.dumps(answer(json.loads(line))).encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 8000), Handler) as server:
        print("listening", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
