"""A process with memory allocated where an engine's weights are. `python weights.py FOLDER` describes it in
FOLDER/ready as JSON, executes FOLDER/go (`sum`, `write`, `free`) and answers in FOLDER/result.

areas: `alone` from malloc as a mapping of its own, `heap` from the main arena, `arena` from another thread's, `bare`
from mmap. `full` and `part` are like a library's data: private mappings of a file, written completely and in their
middle.
"""

import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
import time

SIZE = 1 << 20
M_MMAP_THRESHOLD = -3
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)


def filled(address, seed):
    for at in range(0, SIZE, 32):
        ctypes.memmove(address + at, hashlib.sha256(f"{seed}{at}".encode()).digest(), 32)
    return address


def main(folder):
    areas = {"alone": filled(libc.malloc(SIZE), "alone")}
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    areas["heap"] = filled(libc.malloc(SIZE), "heap")
    thread = threading.Thread(target=lambda: areas.update(arena=filled(libc.malloc(SIZE), "arena")))
    thread.start()
    thread.join()
    kept = mmap.mmap(-1, SIZE + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    areas["bare"] = filled(ctypes.addressof(ctypes.c_char.from_buffer(kept)) + mmap.PAGESIZE, "bare")
    with open(f"{folder}/library", "wb") as file:
        file.write(hashlib.sha256(b"library").digest() * (SIZE // 32))
    libraries = []
    for name, first in (("full", 0), ("part", SIZE // 4)):
        with open(f"{folder}/library", "rb") as file:
            libraries.append(
                mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            )
        areas[name] = ctypes.addressof(ctypes.c_char.from_buffer(libraries[-1]))
        for at in range(first, SIZE - first, 32):
            ctypes.memmove(areas[name] + at, hashlib.sha256(f"{name}{at}".encode()).digest(), 32)

    def tell(name, what):
        with open(f"{folder}/{name}.new", "w") as file:
            json.dump(what, file)
        os.rename(f"{folder}/{name}.new", f"{folder}/{name}")

    def sums():
        return {n: hashlib.sha256(ctypes.string_at(a, SIZE)).hexdigest() for n, a in areas.items()}

    tell("ready", {"pid": os.getpid(), "areas": areas, "sums": sums()})
    while True:
        if not os.path.exists(f"{folder}/go"):
            time.sleep(0.005)
            continue
        with open(f"{folder}/go") as file:
            order = json.load(file)
        os.unlink(f"{folder}/go")
        for name in order.get("write", ()):
            ctypes.memset(areas[name] + SIZE // 2, 0xAB, 8192)
        for name in order.get("free", ()):
            libc.free(areas.pop(name))
        with open("/proc/self/maps") as maps:
            shown = {
                name: next(
                    line.split()[5:]
                    for line in lines
                    if int(line.split("-")[0], 16) <= at + SIZE // 2 < int(line.split(" ")[0].split("-")[1], 16)
                )
                for lines in [maps.readlines()]
                for name, at in areas.items()
            }
        tell("result", {"sums": sums(), "maps": shown})


main(sys.argv[1])
