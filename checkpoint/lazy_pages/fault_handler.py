"""The page server's work for one process tree: placing the pages of the restored processes.

Standard library only.

Order of work: the recorded working set, as soon as CRIU has registered a process's memory (while CRIU continues with
the rest); single faults in between; once the owner reports the first token, the pages of the next requests; then all
other pages, at a limited rate. When every page of every process is in place, the owner closes its descriptors first,
then this side closes its own.

Why memory cannot be corrupted:
- One thread reads a tree's events and places its pages, so no event is read between looking a page up and placing
  it. The kernel refuses to place anything (EAGAIN) while an announced change is unread, and a process that drops
  pages waits until then.
- A page is placed only where none exists: the kernel answers EEXIST and overwrites nothing.
- Memory that a process dropped, unmapped or moved is cut from its map before anything else is placed; it then reads
  as zeros.
- The owner holds a duplicate of every descriptor. If this process dies or the tree fails here, faults wait (and do
  not read zeros) until the owner, which sees the control socket close, has killed the tree.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import struct
import time
from collections import deque

from checkpoint.criu.pagemap import PAGE, argument_pages
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import Again, Gone, PendingPages, Space, zero_source
from checkpoint.lazy_pages.copy_plan import CHUNK, CLAIMED, Plan
from checkpoint.lazy_pages.copy_worker import SecondCopier
from checkpoint.lazy_pages.read_order import Reading
from checkpoint.lazy_pages.readahead import ArrivingSource, Bell, Fetcher, Waiting
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.lazy_pages.shared_cache import Planner
from checkpoint.lazy_pages.stats import Stats
from checkpoint.lazy_pages.touched_pages import namespace_of
from checkpoint.lazy_pages.working_set import BadWorkingSet, Range, WorkingSet

# Sent by CRIU instead of a process number when every process runs (LAZY_PAGES_RESTORE_FINISHED in criu/uffd.c).
_RESTORED = 0x52535446
# A fault outside the working set also brings its neighbours in a block of this size.
_AROUND = 64 << 10
# Size of the block of neighbours kept for the next restore.
_KEPT_AROUND = 16 << 10
# Number of background ranges fetched ahead of being placed.
_WINDOW = 32
# Amount placed between two checks for events.
_STEP_BYTES = CHUNK
_STEP_PIECES = 64
_RETRY_S = 0.0005
# Timeout at a tree's end for writing its caches: some 100 MB to disk, once.
_SETTLE_S = 1.0
# Number of working-set ranges sampled for residency in the page cache.
_SAMPLES = 200


class Daemon:
    """Serves one process tree (see the module's docstring).

    `control` and `listener` are the owner's sockets.
    """

    def __init__(
        self, control: socket.socket, listener: socket.socket, config: dict[str, object], reading: Reading | None
    ) -> None:
        self.control = control
        self.listener = listener
        self.images_dir = str(config["images"])
        self.record = bool(config["record"])
        self.rate = float(str(config["rest_bytes_per_s"]))
        self.patience_s = float(str(config["first_token_timeout_s"]))
        self.stats = Stats()
        self.epoll = select.epoll()
        self.bell = Bell()
        self.criu: socket.socket | None = None
        self.spaces: dict[int, Space] = {}  # by descriptor
        self.numbers = 0
        self.released: set[int] = set()  # spaces that need nothing more, as reported to the owner
        self.restored = self.first_token = self.after_requests = False
        self.started = time.monotonic()
        self.first_token_limit = 0.0
        self.faults: deque[tuple[Space, int, float]] = deque()  # (space, address, since when)
        self.trace_before: list[tuple[int, int]] = []
        self.trace_after: list[tuple[int, int]] = []
        presence = ResidencyBitmap.open(str(config["arriving"])) if config.get("arriving") else None
        self.reading = reading
        self.awaiting = False  # whether the first phase waits until all of it was requested from the disk
        self.namespace = 0  # of the tree's process numbers, by inode
        self.planner = Planner(self.images_dir, presence)
        self.images, self.sources = self.planner.images, self.planner.sources
        self.zeros = zero_source()
        self.working_set = self.load_working_set(str(config["working_set"] or ""))
        ring = self.bell.ring
        self.ahead = Waiting(ring) if presence else Fetcher("ahead", ring)
        self.cold = Waiting(ring, self.want) if presence else Fetcher("cold", ring)
        self.second = SecondCopier(ring)
        self.cold_faults: dict[int, tuple[Space, int, float]] = {}
        self.cold_number = 0
        for thread in (self.ahead, self.cold, self.second):
            thread.start()
        # The phase: what is placed ahead of faults now.
        self.phase = ""
        self.plans: dict[int, Plan] = {}  # of the phases hot and later, by process
        self.made: dict[int, Plan] = {}  # the plans of the phase hot, if not from the cache: to be cached
        self.rest: deque[Range] = deque()
        self.rest_batch = 0
        self.rest_queued = 0
        self.fetched: set[int] = set()
        self.fetch_number = 0
        self.deferred: dict[int, float] = {}  # process → earliest time of the next attempt
        self.not_before = 0.0
        self.helped = False  # whether the second copier may help: it does not wait for a fetcher
        if reading:
            reading.listen(self.bell.ring)
        try:
            self.begin("hot", self.arguments() if self.record else self.working_set.before_first_token)
        except BaseException:
            self.close()
            raise

    def load_working_set(self, path: str) -> WorkingSet:
        if not path or not os.path.exists(path):
            return WorkingSet()
        try:
            return self.planner.working_set(path)
        except BadWorkingSet as error:
            self.tell(event="warning", message=f"{error}; restoring without it, and the next restore records it anew")
            with contextlib.suppress(OSError):
                os.unlink(path)
            return WorkingSet()
        except OSError as error:
            self.tell(event="warning", message=f"{error}; restoring without it")
            return WorkingSet()

    def arguments(self) -> list[Range]:
        """Return the ranges of the processes' command lines and environments.

        /proc cannot show them until they are in place.
        """
        found = [(pid, *argument_pages(self.images_dir, pid)) for pid in self.images]
        return [(pid, low, high) for pid, start, end in found for low, high in self.images[pid].split(start, end)]

    def want(self, path: str, offset: int, length: int) -> None:
        """Ask the owner for bytes that a fault waits for and that have not arrived."""
        self.tell(event="wanted", path=path, offset=offset, length=length)

    def tell(self, fds: tuple[int, ...] = (), **message: object) -> None:
        socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))

    def warn(self, what: str, error: OSError) -> None:
        """Report a disk error as a warning with a code."""
        from checkpoint.disk import failure  # its imports take 5 ms

        self.tell(event="warning", message=str(failure(what, error)))

    def now(self) -> float:
        """Return seconds since the start."""
        return time.monotonic() - self.started

    # The loop

    def run(self) -> None:
        """Run until every page is in place or the owner is gone."""
        self.stats.listening_s = self.now()
        self.tell(event="listening")
        for fd in (self.control.fileno(), self.listener.fileno(), self.bell.fd):
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
                elif fd == self.bell.fd:
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
            while self.advance():
                pass
            if self.restored and not self.spaces:
                self.tell(event="complete", **self.stats.as_dict())  # type: ignore[arg-type]  # no count is named fds
                return

    def timeout(self, now: float) -> float:
        """Return how long the loop may sleep: at most until the next extent may be placed."""
        limits = [_RETRY_S] if self.faults else []
        if self.phase == "rest":
            if self.rest and self.rest_ready():
                limits.append(max(0.0, self.not_before - now))
        else:
            limits += [max(0.0, self.deferred.get(pid, 0.0) - now) for pid in self.plans if self.ready(pid) is not None]
        if self.restored and not self.first_token:
            limits.append(max(0.0, self.first_token_limit - now))
        return min(limits, default=-1)

    # Messages from the owner and CRIU

    def hear(self) -> bool:
        try:
            data = self.control.recv(1 << 16)
        except ConnectionResetError:
            data = b""
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
        elif message["op"] == "arrived":
            for waiting in (self.ahead, self.cold):
                if isinstance(waiting, Waiting):
                    waiting.look()
        elif message["op"] == "released":
            for space in [space for space in self.spaces.values() if space.number == message["number"]]:
                self.drop(space)
        elif message["op"] == "stats":
            left = sum(space.map.size for space in self.spaces.values())
            self.tell(event="stats", left=left, **self.stats.as_dict())  # type: ignore[arg-type]  # no count is named fds
        return True

    def saw_first_token(self) -> None:
        if not self.first_token:
            self.first_token = True
            self.stats.faults_before_first_token = self.stats.faults

    def save(self, path: str) -> None:
        base = None if self.record else self.working_set
        shown = [(pid, page) for pid, start, end in self.arguments() for page in range(start, end, PAGE)]
        found = WorkingSet.from_faults(self.trace_before + shown, self.trace_after, self.images, base)
        try:
            found.save(path)
        except OSError as error:
            self.warn("the working set is not kept", error)
            return
        self.tell(event="saved", path=path, ranges=len(found.ranges), first=found.first)

    def accept(self) -> None:
        self.criu, _ = self.listener.accept()
        self.namespace = namespace_of(self.criu)
        self.epoll.unregister(self.listener.fileno())
        self.listener.close()
        self.epoll.register(self.criu.fileno(), select.EPOLLIN)

    def hear_criu(self, criu: socket.socket) -> None:
        data = criu.recv(4, socket.MSG_WAITALL)
        if len(data) < 4:
            # If CRIU failed, the owner sees its exit code and log, and closes the control socket.
            self.epoll.unregister(criu.fileno())
            criu.close()
            self.criu = None
            return
        (number,) = struct.unpack("<i", data)
        if number == _RESTORED:
            self.restored = True
            self.stats.restored_s = self.now()
            self.first_token_limit = time.monotonic() + self.patience_s
            for space in self.spaces.values():
                space.settled = True
            self.tell(event="restored")
        elif number > 0:  # a negative number is a zombie, which has no memory
            _, ancillary, _, _ = criu.recvmsg(1, socket.CMSG_LEN(4))
            if not ancillary:
                raise RuntimeError(
                    "no file descriptor is left for a restored process's memory; raise the limit (ulimit -n)"
                )
            fds = array.array("i")
            fds.frombytes(ancillary[0][2][:4])
            image = self.images.get(number)
            if image is None:
                raise RuntimeError(f"CRIU restores process {number}, which is not in {self.images_dir}")
            source = self.sources.get(image.pages_file) or next(iter(self.sources.values()))
            self.add(Space(0, number, fds[0], PendingPages(image.runs), image, source))

    def add(self, space: Space) -> None:
        os.set_inheritable(space.fd, False)
        self.numbers += 1
        space.number = self.numbers
        self.stats.spaces_s = self.now()
        self.spaces[space.fd] = space
        self.tell((space.fd,), event="space", number=space.number, pid=space.pid, left=space.map.size)
        self.epoll.register(space.fd, select.EPOLLIN)
        if self.phase == "hot" and self.helped and not self.awaiting and (plan := self.plans.get(space.pid)):
            self.second.submit(space, plan)

    # Events of the processes

    def read_events(self, space: Space, since: float) -> None:
        try:
            with space.placing:
                events = uffd.read_events(space.fd)
                # Set it before the second copier checks again.
                space.changed = space.changed or any(event[0] not in (uffd.PAGEFAULT, uffd.FORK) for event in events)
                # Collect what it has placed so far. Extents placed later are in the parent only; a forked child still
                # needs them.
                self.collect_second()
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
                continue
            if kind == uffd.FORK:
                self.stats.forks += 1
                child = Space(0, space.pid, a & 0xFFFFFFFF, space.map.copy(), space.image, space.source)
                for start, end in space.image.wiped_on_fork:
                    child.map.cut(start, end)
                child.settled = child.changed = True
                self.add(child)
                continue
            if kind in (uffd.REMOVE, uffd.UNMAP):
                self.stats.removed += 1
                space.map.cut(a, b)
            elif kind == uffd.REMAP:
                self.stats.moved += 1
                space.map.move(a, b, c)

    def serve_faults(self) -> None:
        """Try each fault once.

        A fault that meets an unread mapping change is retried after the event was read.
        """
        for _ in range(len(self.faults)):
            space, address, since = self.faults.popleft()
            if self.spaces.get(space.fd) is not space:  # gone; its descriptor number may have been reused
                continue
            try:
                served = self.serve(space, address, since)
            except Gone:
                self.drop(space)
                continue
            except Again:
                self.faults.append((space, address, since))
                return
            if served:
                stall = time.monotonic() - since
                self.stats.stall_s += stall
                self.stats.stall_worst_s = max(self.stats.stall_worst_s, stall)

    def serve(self, space: Space, address: int, since: float) -> bool:
        """Serve one fault.

        Return False if its pages must first be read from a disk, which another thread does.
        """
        plan = self.plans.get(space.pid)
        piece = plan.find(address) if plan else None
        found = space.rough_map.find(address)
        if space.changed and not (found and space.unmoved(address, address + PAGE, found[2] + address - found[0])):
            piece = None
        if plan and piece is not None:
            if plan.done[piece] == CLAIMED:
                return True  # the second copier places it now, which wakes the waiting thread
            low, high = plan.starts[piece], plan.ends[piece]
        elif self.record:
            low, high = address, address + PAGE
        else:
            low = address & ~(_AROUND - 1)
            high = low + _AROUND
            self.stats.faults_missed += 1
        if found is None:
            if plan and piece is not None:
                self.stats.bytes_zero += space.run(plan, piece, self.zeros)
                uffd.wake(space.fd, address, PAGE)
            else:
                following = space.rough_map.at_or_after(address)
                end = min(high, following[0]) if following else high
                self.stats.bytes_zero += space.zero_fault(address, end)
            self.stats.faults_zero += 1
            return True
        low, high = max(low, found[0]), min(high, found[1])
        if piece is None and not self.record and not self.after_requests:
            # Record the nearest neighbours, which would be the next restore's faults. Recording all would grow a
            # working set fivefold.
            trace = self.trace_after if self.first_token else self.trace_before
            first = address & ~(_KEPT_AROUND - 1)
            trace.extend((space.pid, page) for page in range(max(low, first), min(high, first + _KEPT_AROUND), PAGE))
        offset = found[2] + low - found[0]
        if piece is None and isinstance(space.source, ArrivingSource) and not space.source.resident(offset, high - low):
            offset, low, high = offset + address - low, address, address + PAGE  # do not wait for the neighbours
        part = (space.source, offset, high - low)
        if plan and piece is not None:
            part = self.planner.packed(plan, piece) or part
        if not part[0].resident(*part[1:]):
            self.cold_number += 1
            self.cold_faults[self.cold_number] = (space, address, since)
            self.cold.submit(self.cold_number, [part])
            return False
        if plan and piece is not None:
            self.stats.bytes_faulted += space.run(plan, piece, self.zeros)
        else:
            self.stats.bytes_faulted += space.place(low, high)
        # Wake explicitly: pages that came another way, or mappings that are gone, woke no thread.
        uffd.wake(space.fd, address, PAGE)
        return True

    def collect_second(self) -> None:
        """Record what the second copier has placed or failed to place."""
        if self.second.failure:
            raise RuntimeError(f"the second copier ended: {self.second.failure}")
        while self.second.done:
            space, plan, piece, placed = self.second.done.popleft()
            if not placed:
                plan.give_back(piece)
            elif self.spaces.get(space.fd) is space:
                self.stats.bytes_ahead += space.placed(plan, piece)
            else:
                plan.finish(piece)  # its process is gone

    # Ahead of faults

    def warm(self, ranges: list[Range]) -> bool:
        """Return whether evenly sampled ranges are all in the page cache; then all ranges count as cached.

        A wrong guess only waits for the disk.
        """
        for process, start, end in ranges[:: max(1, len(ranges) // _SAMPLES)]:
            image = self.images.get(process)
            if image and any(
                not self.sources[image.pages_file].resident(offset, high - low)
                for low, high, offset in image.within(start, end) + image.mapped_within(start, end)
            ):
                return False
        return True

    def begin(self, phase: str, ranges: list[Range]) -> None:
        """Plan a phase of the working set.

        All of it is submitted to the fetcher, unless it was requested from the disk already.
        """
        self.phase = phase
        reading = self.reading if phase == "hot" else None
        listed = bool(reading and reading.working_set == self.working_set.digest != b"")
        # If images are still arriving, samples do not represent the rest.
        self.helped = not isinstance(self.ahead, Waiting) and (listed or self.warm(ranges))
        if self.helped and listed and reading:
            if cached := self.planner.cached_plans(self.working_set, self.zeros):
                self.plans = cached
                self.awaiting = reading.cold and not reading.asked.is_set()
                return
            reading.working_set = b""  # the plans cached with it are gone: make both anew
            self.helped = not reading.cold
        first = self.fetch_number + 1
        self.plans, jobs = self.planner.plans(ranges, self.zeros, first)
        if phase == "hot":
            self.made = self.plans
        if self.helped:
            for plan in self.plans.values():
                plan.resident = True
            return
        for self.fetch_number, parts in enumerate(jobs, first):
            self.ahead.submit(self.fetch_number, parts)

    def begin_rest(self) -> None:
        if error := self.planner.keep_maps():
            self.warn("the next restore reads all page maps again", error)
        if self.reading and self.made:
            self.planner.keep(self.working_set, self.made, self.reading, self.namespace)
            self.made = {}
        self.phase, self.plans = "rest", {}
        self.rest = deque(
            (space.number, low, min(low + CHUNK // 2, end))
            for space in self.spaces.values()
            for start, end, _ in space.map
            for low in range(start, end, CHUNK // 2)
        )
        self.rest_batch = self.fetch_number + 1
        self.rest_queued = 0
        self.fetch_rest()

    def fetch_rest(self) -> None:
        """Keep the fetcher one window ahead in the background phase, with one job per range."""
        by_number = {space.number: space for space in self.spaces.values()}
        for number, start, end in (
            list(self.rest)[self.rest_queued : _WINDOW] if self.rest_queued < _WINDOW // 2 else []
        ):
            space = by_number.get(number)
            parts = (
                [(space.source, offset, high - low) for low, high, offset in space.map.within(start, end)]
                if space
                else []
            )
            self.fetch_number += 1
            self.rest_queued += 1
            if space is None or all(source.resident(offset, length) for source, offset, length in parts):
                self.fetched.add(self.fetch_number)
            else:
                self.ahead.submit(self.fetch_number, parts)

    def rest_ready(self) -> bool:
        return self.rest_batch in self.fetched

    def collect(self) -> None:
        """Collect the results of the fetchers and the second copier."""
        self.collect_second()
        if self.awaiting and self.reading and self.reading.asked.is_set():
            self.awaiting = False
            self.stats.bytes_cold += self.reading.size
            for space in self.spaces.values():
                if plan := self.plans.get(space.pid):
                    self.second.submit(space, plan)
        for fetcher in (self.ahead, self.cold):
            while fetcher.done:
                number, code, cold = fetcher.done.popleft()
                if code:
                    raise OSError(code, f"an image file cannot be read: {os.strerror(code)}")
                self.stats.bytes_cold += cold
                if fetcher is self.ahead:
                    self.fetched.add(number)
                else:
                    self.faults.append(self.cold_faults.pop(number))

    def ready(self, pid: int) -> int | None:
        """Return the next extent of a process that can be placed, ignoring its retry time."""
        plan = self.plans[pid]
        index = None if self.awaiting else plan.next()
        if index is None or not (plan.resident or plan.batches[index] in self.fetched):
            return None
        return index if self.restored or any(space.pid == pid for space in self.spaces.values()) else None

    def step(self, now: float) -> None:
        """Place a little ahead of faults, for the next process that is ready."""
        if self.phase == "rest":
            self.step_rest(now)
            return
        for pid in list(self.plans):
            if self.deferred.get(pid, 0.0) <= now and self.ready(pid) is not None:
                break
        else:
            return
        plan = self.plans.pop(pid)  # move it to the end: processes take turns
        self.plans[pid] = plan
        spaces = [space for space in self.spaces.values() if space.pid == pid and not space.changed] or [
            space for space in self.spaces.values() if space.pid == pid
        ]
        placed, pieces = 0, _STEP_PIECES
        if spaces and plan.resident and not spaces[0].changed:
            copied, zeros = spaces[0].burst(plan, _STEP_PIECES, _STEP_BYTES)
            self.stats.bytes_ahead += copied
            self.stats.bytes_zero += zeros
            if copied or zeros:
                self.stats.first_placed_s = self.stats.first_placed_s or self.now()
                return
            pieces = 1  # the refused one
        for _ in range(pieces):
            index = self.ready(pid)
            if index is None or placed >= _STEP_BYTES:
                return
            if not spaces:
                plan.finish(index)  # its process is gone
                continue
            try:
                size = spaces[0].run(plan, index, self.zeros)
            except Gone:
                self.drop(spaces.pop(0))
            except Again:
                self.deferred[pid] = now + _RETRY_S
                return
            else:
                placed += plan.ends[index] - plan.starts[index]
                if plan.zero[index]:
                    self.stats.bytes_zero += size
                else:
                    self.stats.bytes_ahead += size
                    self.stats.first_placed_s = self.stats.first_placed_s or self.now()

    def step_rest(self, now: float) -> None:
        if not self.rest or now < self.not_before or not self.rest_ready():
            return
        number, start, end = self.rest[0]
        for space in list(self.spaces.values()):
            if space.number == number:
                try:
                    size = space.place(start, end)
                except Gone:
                    self.drop(space)
                except Again:
                    self.not_before = now + _RETRY_S
                    return
                else:
                    self.stats.bytes_rest += size
                    self.not_before = max(self.not_before, now - 0.01) + size / self.rate
        self.rest.popleft()
        self.fetched.discard(self.rest_batch)
        self.rest_batch += 1
        self.rest_queued -= 1
        self.fetch_rest()

    def advance(self) -> bool:
        """Begin the next phase if this one is done; return whether one began.

        Phase "later" begins after the first token.
        """
        if self.phase == "rest":
            return not self.rest and self.finish()
        if self.awaiting or any(plan.left for plan in self.plans.values()):
            return False
        if self.phase == "hot" and self.restored:
            self.stats.hot_done_s = self.stats.hot_done_s or self.now()
            if self.first_token:
                self.begin("later", [] if self.record else self.working_set.after_first_token)
                return True
        if self.phase == "later" and (self.after_requests or not self.record):
            self.begin_rest()
            return True
        return False

    # The end

    def finish(self) -> bool:
        """Report that all pages are in place.

        The owner closes its descriptors first; after our close, the kernel serves all faults.
        """
        if any(space.map for space in self.spaces.values()):
            self.begin_rest()  # moved or forked during the background phase
            return True
        for space in self.spaces.values():
            if space.number not in self.released:
                self.released.add(space.number)
                self.tell(event="placed", number=space.number)
        return False

    def drop(self, space: Space) -> None:
        if self.spaces.pop(space.fd, None) is not None:
            self.epoll.unregister(space.fd)
            with space.placing:
                space.open = False
                os.close(space.fd)
            self.tell(event="gone", number=space.number)

    def close(self) -> None:
        """Close this tree's descriptors and stop its threads, without joining.

        The caller closes the control socket and listener.
        """
        for space in self.spaces.values():
            with space.placing:
                space.open = False
                os.close(space.fd)
        self.spaces.clear()
        for helper in (self.ahead, self.cold, self.second, self.reading):
            if helper is not None:
                helper.stop()
        if self.criu is not None:
            self.criu.close()
        self.epoll.close()
        self.planner.settle(_SETTLE_S)
