"""The page server's own process: puts the pages of one restored process tree in place.

Run as `python -I -S -c '…main(control, listener)'` by checkpoint.pages.server. Standard library only: it starts in 25 ms, beside CRIU.

Order of work: the recorded working set as soon as CRIU has registered a process's memory (while CRIU goes on with the rest); single
faults in between; after the owner says that the first token was seen, what the next requests need; then everything else, at a bounded
rate. When every page of every process is in place the owner lets go of its descriptors, this process closes its own, and exits.

Why it cannot corrupt:
- One thread reads events and places pages, so no event is read between looking a page up and placing it. The kernel refuses to place
  anything (EAGAIN) while a change that it announced waits to be read, and a process that drops pages waits until that was read.
- A page is placed only where none is: the kernel answers EEXIST and nothing is overwritten.
- What a process dropped, unmapped or moved away is cut from its map before anything else is placed; then it reads as zeros.
- The owner holds a duplicate of every descriptor. Were this process to die, faults would wait (not read zeros) until the owner,
  which sees the control socket close, has killed the tree.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import select
import socket
import struct
import time
from collections import deque

from checkpoint.pages import uffd
from checkpoint.pages.fetch import Fetcher, Source
from checkpoint.pages.images import PAGE, ProcessImage, process_ids, read_process
from checkpoint.pages.pagemap import PageMap
from checkpoint.pages.workingset import BadWorkingSet, Range, WorkingSet

# What CRIU sends in place of a process number when every process runs (LAZY_PAGES_RESTORE_FINISHED in criu/uffd.c).
_RESTORED = 0x52535446
# One call places at most this much: a fault waits for at most one, 0.2 ms.
_CHUNK = 512 << 10
# A fault brings its neighbours in this block with it.
_AROUND = 64 << 10
# How far reading ahead may be in front of placing, once the first token was seen.
_WINDOW = 32
_BATCH = 32
_ZEROS = 1 << 20
_RETRY_S = 0.0005


class Space:
    """One address space: a restored process or a child that it forked since."""

    __slots__ = ("fd", "image", "map", "number", "pid", "source")

    def __init__(self, number: int, pid: int, fd: int, pages: PageMap, image: ProcessImage, source: Source) -> None:
        self.number = number
        self.pid = pid
        self.fd = fd
        self.map = pages
        self.image = image
        self.source = source


class Stats:
    """What the owner is told; bytes and seconds."""

    __slots__ = (
        "bytes_ahead",
        "bytes_cold",
        "bytes_faulted",
        "bytes_rest",
        "bytes_zero",
        "faults",
        "faults_before_first_token",
        "faults_zero",
        "forks",
        "hot_done_s",
        "moved",
        "removed",
        "restored_s",
        "stall_s",
        "stall_worst_s",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


class Daemon:
    """See the module. `control` and `listener` are the owner's sockets."""

    def __init__(self, control: socket.socket, listener: socket.socket, config: dict[str, object]) -> None:
        self.control = control
        self.listener = listener
        self.images_dir = str(config["images"])
        self.record = bool(config["record"])
        self.rate = float(str(config["rest_bytes_per_s"]))
        self.patience_s = float(str(config["first_token_timeout_s"]))
        self.stats = Stats()
        self.epoll = select.epoll()
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.criu: socket.socket | None = None
        self.spaces: dict[int, Space] = {}  # by descriptor
        self.numbers = 0
        self.restored = False
        self.first_token = False
        self.after_requests = False
        self.started = time.monotonic()
        self.first_token_limit = 0.0
        self.faults: deque[tuple[Space, int, float]] = deque()  # (where, address, since when at most)
        self.trace_before: list[tuple[int, int]] = []
        self.trace_after: list[tuple[int, int]] = []
        self.images = {pid: read_process(self.images_dir, pid) for pid in process_ids(self.images_dir)}
        self.sources: dict[str, Source] = {}
        for image in self.images.values():
            if image.runs and image.pages_file not in self.sources:
                self.sources[image.pages_file] = Source(f"{self.images_dir}/{image.pages_file}")
        self.working_set = self.load_working_set(str(config["working_set"] or ""))
        self.zeros = uffd.zero_pages(_ZEROS)
        # Work by plan: a list of ranges, fetched in batches ahead of being placed, and placed process by process in turn.
        self.plan: list[Range] = []
        self.plan_name = ""
        self.next_submit = 0
        self.placed = 0  # ranges
        self.fetched: set[int] = set()
        self.queues: dict[int, deque[tuple[int, int, int]]] = {}  # process → (start, end, batch)
        self.deferred: dict[int, float] = {}  # process → not before
        self.not_before = 0.0
        self.completing: set[int] = set()
        self.ahead = Fetcher("ahead", self.wake)
        self.cold = Fetcher("cold", self.wake)
        self.cold_faults: dict[int, list[tuple[Space, int, float]]] = {}
        for thread in (self.ahead, self.cold):
            thread.start()
        self.begin("hot", [] if self.record else self.working_set.before_first_token)

    def load_working_set(self, path: str) -> WorkingSet:
        if not path or not os.path.exists(path):
            return WorkingSet()
        try:
            return WorkingSet.load(path)
        except (BadWorkingSet, OSError) as error:
            self.tell(event="warning", message=f"{error}; restoring without it")
            return WorkingSet()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, 1)

    def tell(self, fds: tuple[int, ...] = (), **message: object) -> None:
        socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))

    # The loop

    def run(self) -> None:
        self.tell(event="listening", ready_s=time.monotonic() - self.started)
        for fd in (self.control.fileno(), self.listener.fileno(), self.wake_fd):
            self.epoll.register(fd, select.EPOLLIN)
        while True:
            ready = self.epoll.poll(self.timeout(time.monotonic()))
            since = time.monotonic()
            for fd, _ in ready:
                if fd in self.spaces:
                    self.read_events(self.spaces[fd], since)
                elif fd == self.control.fileno():
                    if not self.hear():
                        return
                elif fd == self.wake_fd:
                    os.eventfd_read(fd)
                    self.collect()
                elif fd == self.listener.fileno():
                    self.accept()
                elif self.criu is not None and fd == self.criu.fileno():
                    self.hear_criu(self.criu)
            self.serve_faults()
            if self.restored and not self.first_token and time.monotonic() > self.first_token_limit:
                self.tell(
                    event="warning", message=f"no first token within {self.patience_s:.0f} s; the rest is brought now"
                )
                self.saw_first_token()
            self.step(time.monotonic())
            while self.placed == len(self.plan) and self.next_plan():
                pass
            if self.restored and not self.spaces:
                self.tell(event="complete", **self.stats.as_dict())
                return

    def timeout(self, now: float) -> float:
        """How long the loop may sleep: until the next range may be placed, at most."""
        limits = [_RETRY_S] if self.faults else []
        if any(self.ready(pid) for pid in self.queues):
            soonest = min(self.deferred.get(pid, 0.0) for pid in self.queues if self.ready(pid))
            limits.append(max(0.0, soonest - now, self.not_before - now))
        if self.restored and not self.first_token:
            limits.append(max(0.0, self.first_token_limit - now))
        return min(limits, default=-1)

    def ready(self, pid: int) -> bool:
        """Whether the next range of a process could be placed, but for the time."""
        queue = self.queues[pid]
        return bool(queue) and queue[0][2] in self.fetched and (self.restored or self.has_space(pid))

    def has_space(self, pid: int) -> bool:
        return any(space.pid == pid for space in self.spaces.values())

    # What the owner and CRIU say

    def hear(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 4)
        for fd in fds:
            os.close(fd)
        if not data:
            return False  # the owner is gone, and with it the sandbox
        message = json.loads(data)
        if message["op"] == "first-token":
            self.saw_first_token()
        elif message["op"] == "requests-done":
            self.saw_first_token()
            self.after_requests = True
            if message["save"]:
                self.save(message["save"])
        elif message["op"] == "released":
            self.release(message["number"])
        elif message["op"] == "stats":
            left = sum(space.map.size for space in self.spaces.values())
            self.tell(event="stats", left=left, **self.stats.as_dict())
        return True

    def saw_first_token(self) -> None:
        if self.first_token:
            return
        self.first_token = True
        self.stats.faults_before_first_token = self.stats.faults

    def save(self, path: str) -> None:
        base = None if self.record else self.working_set
        found = WorkingSet.from_faults(self.trace_before, self.trace_after, self.images, base)
        try:
            found.save(path)
        except OSError as error:
            self.tell(event="warning", message=f"the working set could not be kept: {error}")
            return
        self.tell(event="saved", path=path, ranges=len(found.ranges), first=found.first)

    def accept(self) -> None:
        self.criu, _ = self.listener.accept()
        self.epoll.unregister(self.listener.fileno())
        self.listener.close()
        self.epoll.register(self.criu.fileno(), select.EPOLLIN)

    def hear_criu(self, criu: socket.socket) -> None:
        data = criu.recv(4, socket.MSG_WAITALL)
        if len(data) < 4:
            self.epoll.unregister(criu.fileno())
            criu.close()
            self.criu = None
            if not self.restored:
                raise RuntimeError("CRIU ended before every process was restored")
            return
        (number,) = struct.unpack("<i", data)
        if number == _RESTORED:
            self.restored = True
            self.stats.restored_s = time.monotonic() - self.started
            self.first_token_limit = time.monotonic() + self.patience_s
            self.tell(event="restored")
        elif number > 0:  # a negative one is a zombie, which has no memory
            _, ancillary, _, _ = criu.recvmsg(1, socket.CMSG_LEN(4))
            fds = array.array("i")
            fds.frombytes(ancillary[0][2][:4])
            self.adopt(number, fds[0])

    def adopt(self, pid: int, fd: int) -> None:
        image = self.images.get(pid)
        if image is None:
            raise RuntimeError(f"CRIU restores process {pid}, which is not in {self.images_dir}")
        self.add(pid, fd, PageMap(image.runs), image)

    def add(self, pid: int, fd: int, pages: PageMap, image: ProcessImage) -> None:
        os.set_inheritable(fd, False)
        self.numbers += 1
        source = self.sources.get(image.pages_file) or next(iter(self.sources.values()))
        self.spaces[fd] = Space(self.numbers, pid, fd, pages, image, source)
        self.tell((fd,), event="space", number=self.numbers, pid=pid, left=pages.size)
        self.epoll.register(fd, select.EPOLLIN)

    # What the processes do

    def read_events(self, space: Space, since: float) -> None:
        try:
            events = uffd.read_events(space.fd)
        except OSError:
            self.drop(space)
            return
        for kind, a, b, c in events:
            if kind == uffd.PAGEFAULT:
                address = b & ~(PAGE - 1)
                self.stats.faults += 1
                self.faults.append((space, address, since))
                if not self.after_requests:
                    (self.trace_after if self.first_token else self.trace_before).append((space.pid, address))
            elif kind in (uffd.REMOVE, uffd.UNMAP):
                self.stats.removed += 1
                space.map.cut(a, b)
            elif kind == uffd.REMAP:
                self.stats.moved += 1
                space.map.move(a, b, c)
            elif kind == uffd.FORK:
                self.stats.forks += 1
                pages = space.map.copy()
                for start, end in space.image.wiped_on_fork:
                    pages.cut(start, end)
                self.add(space.pid, a & 0xFFFFFFFF, pages, space.image)

    def serve_faults(self) -> None:
        """Once through the faults; those that meet a change of mappings come again after it has been read."""
        for _ in range(len(self.faults)):
            space, address, since = self.faults.popleft()
            if space.fd not in self.spaces:
                continue
            found = space.map.find(address)
            if found is None:
                served = self.zero_fault(space, address)
            else:
                start, end, offset = found
                low, high = address, address + PAGE
                if not self.record:
                    block = address & ~(_AROUND - 1)
                    low, high = max(start, block), min(end, block + _AROUND)
                if not space.source.resident(offset + low - start, high - low):
                    self.fetch_cold(space, address, since, offset + low - start, high - low)
                    continue
                served = self.place_fault(space, address, low, high, offset + low - start)
            if served:
                stall = time.monotonic() - since
                self.stats.stall_s += stall
                self.stats.stall_worst_s = max(self.stats.stall_worst_s, stall)
            else:
                self.faults.append((space, address, since))
                return  # read what waits first

    def place_fault(self, space: Space, address: int, low: int, high: int, offset: int) -> bool:
        """Bring [low, high) around a fault; False when the process is changing its mappings."""
        code = self.place(space, low, high, offset)
        if code == errno.EAGAIN:
            return False
        self.stats.bytes_faulted += high - low
        if code == errno.ENOENT and self.place(space, address, address + PAGE, offset + address - low) == errno.ENOENT:
            # Not ours any more: whoever waits there sees what is there now.
            space.map.cut(address, address + PAGE)
            uffd.wake(space.fd, address, PAGE)
        return True

    def zero_fault(self, space: Space, address: int) -> bool:
        end = address + PAGE
        if not self.record:
            end = (address & ~(_AROUND - 1)) + _AROUND
            following = space.map.at_or_after(address)
            if following:
                end = min(end, following[0])
        done, code = uffd.zero(space.fd, address, end - address)
        if code == errno.ENOENT and end - address > PAGE:
            done, code = uffd.zero(space.fd, address, PAGE)
        if not done:
            if code == errno.EAGAIN:
                return False
            if code == errno.ESRCH:
                self.drop(space)
                return True
            if code not in (errno.EEXIST, errno.ENOENT):
                raise OSError(code, f"UFFDIO_ZEROPAGE in process {space.pid}: {os.strerror(code)}")
            uffd.wake(space.fd, address, PAGE)
        self.stats.faults_zero += 1
        self.stats.bytes_zero += done
        return True

    def fetch_cold(self, space: Space, address: int, since: float, offset: int, length: int) -> None:
        number = len(self.cold_faults) + 1 if not self.cold_faults else max(self.cold_faults) + 1
        self.cold_faults[number] = [(space, address, since)]
        self.cold.submit(number, [(space.source, offset, length)])

    def place(self, space: Space, start: int, end: int, offset: int) -> int:
        """Place image pages; returns 0 when all are there, or the errno that the caller must deal with (EAGAIN, ENOENT)."""
        while start < end:
            done, code = uffd.copy(space.fd, start, space.source.address + offset, end - start)
            if code == errno.EEXIST and not done:
                done = PAGE
            if done:
                space.map.cut(start, start + done)
                start += done
                offset += done
                continue
            if code == errno.ESRCH:
                self.drop(space)
                return 0
            if code in (errno.EAGAIN, errno.ENOENT):
                return code
            raise OSError(code, f"UFFDIO_COPY in process {space.pid}: {os.strerror(code)}")
        return 0

    # The plan

    def begin(self, name: str, ranges: list[Range]) -> None:
        self.plan_name = name
        self.plan = ranges
        self.next_submit = self.placed = 0
        self.fetched.clear()
        self.queues = {}
        for index, (pid, start, end) in enumerate(ranges):
            self.queues.setdefault(pid, deque()).append((start, end, index // _BATCH))
        self.submit_ahead()

    def submit_ahead(self) -> None:
        """Let the fetcher run ahead: through all of the working set, and a window's worth of the rest."""
        limit = len(self.plan) if self.plan_name != "rest" else min(len(self.plan), self.placed + _WINDOW)
        while self.next_submit < limit:
            parts = []
            for pid, start, end in self.plan[self.next_submit : self.next_submit + _BATCH]:
                image = self.images.get(pid)
                if image is not None:
                    source = self.sources.get(image.pages_file)
                    if source:
                        parts += [(source, offset, high - low) for low, high, offset in image.within(start, end)]
            self.ahead.submit(self.next_submit // _BATCH, parts)
            self.next_submit += _BATCH

    def collect(self) -> None:
        """What the fetchers have brought."""
        while self.ahead.done:
            number, code, cold = self.ahead.done.popleft()
            self.failed_read(code)
            self.stats.bytes_cold += cold
            self.fetched.add(number)
        while self.cold.done:
            number, code, cold = self.cold.done.popleft()
            self.failed_read(code)
            self.stats.bytes_cold += cold
            self.faults.extend(self.cold_faults.pop(number))

    @staticmethod
    def failed_read(code: int) -> None:
        if code:
            raise OSError(code, f"an image file cannot be read: {os.strerror(code)}")

    def step(self, now: float) -> None:
        """Place one chunk of the plan, of the next process that is ready for one."""
        if now < self.not_before:
            return
        for pid, queue in self.queues.items():
            if self.deferred.get(pid, 0.0) <= now and self.ready(pid):
                break
        else:
            return
        # Take turns.
        del self.queues[pid]
        self.queues[pid] = queue
        start, end, batch = queue[0]
        stop = min(end, start + _CHUNK)
        for space in [space for space in self.spaces.values() if space.pid == pid]:
            if not self.fill(space, start, stop):
                self.deferred[pid] = now + _RETRY_S
                return
        if stop < end:
            queue[0] = (stop, end, batch)
        else:
            queue.popleft()
            self.placed += 1
        if self.plan_name == "rest":
            self.not_before = max(self.not_before, now - 0.01) + (stop - start) / self.rate
            self.submit_ahead()

    def fill(self, space: Space, start: int, end: int) -> bool:
        """Place what the image has of [start, end), and zeros elsewhere if this is working set; False: try again later."""
        position = start
        for low, high, offset in space.map.within(start, end):
            if not (self.fill_zeros(space, position, low) and self.fill_pages(space, low, high, offset)):
                return False
            position = high
        return self.fill_zeros(space, position, end)

    def fill_pages(self, space: Space, start: int, end: int, offset: int) -> bool:
        while True:
            code = self.place(space, start, end, offset)
            if not code:
                if self.plan_name == "rest":
                    self.stats.bytes_rest += end - start
                else:
                    self.stats.bytes_ahead += end - start
                return True
            if code == errno.EAGAIN or not self.restored:
                return False
            # Mappings were split or unmapped since the snapshot: find out page by page, halving.
            left = space.map.within(start, end)
            if not left:
                return True
            start, end, offset = left[0][0], left[-1][1], left[0][2]
            if end - start <= PAGE:
                space.map.cut(start, end)
                return True
            half = start + (end - start) // PAGE // 2 * PAGE
            return all(self.fill_pages(space, *piece) for piece in space.map.within(start, half)) and all(
                self.fill_pages(space, *piece) for piece in space.map.within(half, end)
            )

    def fill_zeros(self, space: Space, start: int, end: int) -> bool:
        if self.plan_name == "rest":
            return True
        while start < end:
            done, code = uffd.copy(space.fd, start, self.zeros, min(end - start, _ZEROS))
            if not done:
                if code == errno.EAGAIN or (code == errno.ENOENT and not self.restored):
                    return False
                if code == errno.ESRCH:
                    return True
                if code not in (errno.EEXIST, errno.ENOENT):
                    raise OSError(code, f"UFFDIO_COPY of zeros in process {space.pid}: {os.strerror(code)}")
                done = PAGE
            else:
                self.stats.bytes_zero += done
            start += done
        return True

    def next_plan(self) -> bool:
        """What comes after a plan that is done: nothing until the owner says that the first token was seen. True when it began."""
        if self.plan_name == "hot" and self.restored:
            self.stats.hot_done_s = self.stats.hot_done_s or time.monotonic() - self.started
            if self.first_token:
                self.begin("later", [] if self.record else self.working_set.after_first_token)
                return True
        elif self.plan_name == "later" and (self.after_requests or not self.record):
            self.begin_rest()
            return True
        elif self.plan_name == "rest":
            return self.finish()
        return False

    def begin_rest(self) -> None:
        self.begin(
            "rest",
            [
                (space.pid, low, min(low + _CHUNK, end))
                for space in self.spaces.values()
                for start, end, _ in space.map
                for low in range(start, end, _CHUNK)
            ],
        )

    # The end

    def finish(self) -> bool:
        """Every page is in place: the owner lets go first, so that this process's close is the last and the kernel takes over."""
        if any(space.map for space in self.spaces.values()):
            self.begin_rest()  # moved or forked while the rest was brought
            return True
        for space in self.spaces.values():
            if space.number not in self.completing:
                self.completing.add(space.number)
                self.tell(event="placed", number=space.number)
        return False

    def release(self, number: int) -> None:
        for space in list(self.spaces.values()):
            if space.number == number:
                self.drop(space)

    def drop(self, space: Space) -> None:
        if self.spaces.pop(space.fd, None) is not None:
            self.epoll.unregister(space.fd)
            os.close(space.fd)
            self.tell(event="gone", number=space.number)


def main(control_fd: int, listener_fd: int) -> int:
    """Serve until everything is in place or the owner is gone. A failure is told to the owner in one line."""
    control = socket.socket(fileno=control_fd)
    listener = socket.socket(fileno=listener_fd)
    for fd in (control_fd, listener_fd):
        os.set_inheritable(fd, False)
    config = json.loads(control.recv(1 << 16))
    try:
        Daemon(control, listener, config).run()
    except (OSError, RuntimeError, ValueError) as error:
        with contextlib.suppress(OSError):
            control.send(json.dumps({"event": "failed", "message": str(error)}).encode())
        return 1
    return 0
