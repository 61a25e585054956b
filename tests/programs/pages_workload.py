"""A process that knows what its memory must contain and applies every memory operation to it. The page tests run it
in a sandbox.

`python pages_workload.py FOLDER`: maps and fills memory, writes FOLDER/ready, and waits for FOLDER/go (a JSON object:
`seed`, `steps`, `touch`). Then it does random reads, writes, madvise, munmap, mremap, mprotect and forks, while a
second thread reads, and compares every page with the model. It writes FOLDER/result (JSON: `errors`, `steps`,
`children`) and waits for the next FOLDER/go.
"""

import ctypes
import json
import os
import random
import sys
import threading
import time

PAGE = 4096
PROT_RW, PROT_READ = 3, 1
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE = 2, 0x20, 0x10, 0x4000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, WIPEONFORK = 4, 8, 14, 15, 18

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

FAILED = ctypes.c_void_p(-1).value


def checked(result, what):
    if result in (FAILED, -1):
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def map_pages(address, pages):
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (MAP_FIXED if address else 0)
    return checked(libc.mmap(address, pages * PAGE, PROT_RW, flags, -1, 0), "mmap")


def reserve(address, pages):
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (MAP_FIXED if address else 0)
    return checked(libc.mmap(address, pages * PAGE, 0, flags, -1, 0), "mmap")


def mapping_end(address):
    with open("/proc/self/maps") as file:
        for line in file:
            start, _, end = line.split(" ", 1)[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return int(end, 16)
    raise AssertionError(f"{address:#x} is not mapped")


def words(address):
    """Return the first, a middle and the last word of a page: all of a page's tag."""
    return tuple(ctypes.c_uint64.from_address(address + at).value for at in (0, 2040, PAGE - 8))


def put(address, tag):
    for at in (0, 2040, PAGE - 8):
        ctypes.c_uint64.from_address(address + at).value = tag


class Memory:
    """Mapped pages and their model: address → tag, 0 for zeros, None where either is right (MADV_FREE)."""

    def __init__(self):
        self.tag = 0
        self.model = {}
        self.holes = []  # addresses for moves and new mappings: (address, pages), reserved so that nothing else is mapped there
        self.alone = False  # without a second thread that could map something into a hole before it is reserved again
        self.errors = []
        self.readonly = set()

    def fill(self, pages, every=1):
        """Make a mapping with every n-th page written and the others never touched."""
        start = map_pages(None, pages)
        for index in range(pages):
            address = start + index * PAGE
            self.model[address] = 0
            if index % every == 0:
                self.write(address)
        return start

    def write(self, address):
        self.tag += 1
        put(address, self.tag)
        self.model[address] = self.tag

    def check(self, address, what):
        expected = self.model[address]
        found = words(address)
        right = {(expected,) * 3} if not isinstance(expected, tuple) else {(e,) * 3 for e in expected}
        if found not in right and len(self.errors) < 20:
            self.errors.append(f"{what}: {address:#x} holds {found}, expected {sorted(right)}")

    def run_at(self, rng, longest):
        """Return a random run of adjacent mapped pages."""
        address = rng.choice(list(self.model))
        run = [address]
        while len(run) < longest and run[-1] + PAGE in self.model:
            run.append(run[-1] + PAGE)
        return run[: rng.randint(1, len(run))]

    # Memory operations

    def op_read(self, rng):
        for address in self.run_at(rng, 8):
            self.check(address, "read")

    def op_write(self, rng):
        for address in self.run_at(rng, 4):
            if address not in self.readonly:
                self.write(address)

    def op_dontneed(self, rng):
        run = self.run_at(rng, 32)
        checked(libc.madvise(run[0], len(run) * PAGE, DONTNEED), "madvise")
        for address in run:
            self.model[address] = 0

    def op_free(self, rng):
        run = self.run_at(rng, 8)
        checked(libc.madvise(run[0], len(run) * PAGE, FREE), "madvise free")
        for address in run:
            old = self.model[address]
            self.model[address] = (0, *(old if isinstance(old, tuple) else (old,)))

    def op_unmap(self, rng):
        run = self.run_at(rng, 16)
        if self.alone and rng.random() < 0.5:
            checked(libc.munmap(run[0], len(run) * PAGE), "munmap")
        reserve(run[0], len(run))
        for address in run:
            del self.model[address]
            self.readonly.discard(address)
        self.holes.append((run[0], len(run)))

    def op_map(self, rng):
        if self.holes:
            start, pages = self.holes.pop(rng.randrange(len(self.holes)))
            map_pages(start, pages)
            for index in range(pages):
                self.model[start + index * PAGE] = 0

    def op_move(self, rng, flags=MREMAP_MAYMOVE | MREMAP_FIXED):
        run = self.run_at(rng, 24)
        # One mapping at a time: a move over several may be carried out in part, and then fails (mremap(2), Linux >= 6.17).
        run = [address for address in run if address < mapping_end(run[0])]
        fits = [hole for hole in self.holes if hole[1] >= len(run)]
        if not fits:
            return
        hole = rng.choice(fits)
        moved = libc.mremap(run[0], len(run) * PAGE, len(run) * PAGE, flags, hole[0])
        checked(moved, "mremap")
        self.holes.remove(hole)
        if hole[1] > len(run):
            self.holes.append((hole[0] + len(run) * PAGE, hole[1] - len(run)))
        for index, address in enumerate(run):
            target = hole[0] + index * PAGE
            self.model[target] = self.model[address]
            if address in self.readonly:
                self.readonly.add(target)
            if flags & MREMAP_DONTUNMAP:
                self.model[address] = 0
            else:
                del self.model[address]
                self.readonly.discard(address)
        if not flags & MREMAP_DONTUNMAP:
            reserve(run[0], len(run))
            self.holes.append((run[0], len(run)))

    def op_move_and_keep(self, rng):
        self.op_move(rng, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)

    def op_protect(self, rng):
        run = self.run_at(rng, 16)
        readonly = rng.random() < 0.5
        checked(libc.mprotect(run[0], len(run) * PAGE, PROT_READ if readonly else PROT_RW), "mprotect")
        (self.readonly.update if readonly else self.readonly.difference_update)(run)

    def op_huge(self, rng):
        run = self.run_at(rng, 64)
        checked(libc.madvise(run[0], len(run) * PAGE, rng.choice((HUGEPAGE, NOHUGEPAGE))), "madvise huge")

    def check_all(self, what):
        for address in list(self.model):
            self.check(address, what)


class World:
    def __init__(self):
        self.memory = Memory()
        for pages, every in ((600, 1), (256, 2), (1500, 1), (64, 7), (900, 3)):
            self.memory.fill(pages, every)
        start = self.memory.fill(1024)
        libc.madvise(start, 1024 * PAGE, HUGEPAGE)
        for pages in (40, 200, 16):
            self.memory.holes.append((reserve(None, pages), pages))
        # A second thread only reads it, all the time.
        self.steady = Memory()
        self.steady.tag = 1 << 40
        self.steady.fill(2000)
        # Must be zero in every child.
        self.wiped = Memory()
        self.wiped.tag = 1 << 41
        wiped = self.wiped.fill(8)
        checked(libc.madvise(wiped, 8 * PAGE, WIPEONFORK), "madvise wipe")

    def read_on(self, seed, stop):
        rng = random.Random(seed)
        addresses = list(self.steady.model)
        while not stop.is_set():
            self.steady.check(rng.choice(addresses), "steady")

    def child(self, rng, steps):
        """Check in a forked child: the parent's memory, some changes of its own, and none of what must not be
        inherited.
        """
        memory = self.memory
        memory.errors = []
        memory.alone = True
        for address in self.wiped.model:
            if words(address) != (0, 0, 0):
                memory.errors.append(f"child: {address:#x} was to be wiped on fork")
        self.work(rng, steps, fork=False)
        memory.check_all("child")
        return memory.errors

    def work(self, rng, steps, fork):
        memory = self.memory
        operations = [memory.op_read] * 6 + [memory.op_write] * 4
        operations += [memory.op_dontneed, memory.op_unmap, memory.op_map, memory.op_move, memory.op_protect] * 2
        operations += [memory.op_free, memory.op_move_and_keep, memory.op_huge]
        children = 0
        for step in range(steps):
            rng.choice(operations)(rng)
            if fork and step % 40 == 20:
                children += self.fork(rng, steps // 8)
        return children

    def fork(self, rng, steps):
        read_end, write_end = os.pipe()
        seed = rng.random()
        pid = os.fork()
        if not pid:
            try:
                errors = self.child(random.Random(seed), steps)
            except BaseException as error:
                errors = [f"child failed: {error!r}"]
            os.write(write_end, json.dumps(errors[:10]).encode())
            os._exit(0)
        os.close(write_end)
        self.memory.op_dontneed(rng)  # beside the child
        with open(read_end, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        self.memory.errors += json.loads(said) if said else [f"a child died: {os.waitstatus_to_exitcode(status)}"]
        return 1

    def serve(self, order):
        rng = random.Random(order["seed"])
        if order.get("touch"):
            for address in list(self.steady.model)[: order["touch"]]:
                self.steady.check(address, "touch")
            return 0
        stop = threading.Event()
        thread = threading.Thread(target=self.read_on, args=(order["seed"], stop))
        thread.start()
        try:
            return self.work(rng, order["steps"], fork=True)
        finally:
            stop.set()
            thread.join()
            self.memory.check_all("end")
            self.steady.check_all("end")
            self.wiped.check_all("end")


def main(folder):
    world = World()
    with open(f"{folder}/ready", "w") as file:
        file.write("1")
    while True:
        try:
            with open(f"{folder}/go") as file:
                order = json.load(file)
        except (FileNotFoundError, ValueError):
            time.sleep(0.002)
            continue
        os.unlink(f"{folder}/go")
        errors = []
        children = 0
        try:
            children = world.serve(order)
        except BaseException as error:
            errors.append(repr(error))
        for memory in (world.memory, world.steady, world.wiped):
            errors += memory.errors
        with open(f"{folder}/result.tmp", "w") as file:
            json.dump({"errors": errors, "children": children, "steps": order.get("steps", 0)}, file)
        os.rename(f"{folder}/result.tmp", f"{folder}/result")


if __name__ == "__main__":
    main(sys.argv[1])
