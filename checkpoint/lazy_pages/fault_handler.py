"""The page server's work for one process tree: events, faults, and the messages of CRIU and the owner.

Standard library only.

Order of work: the recorded working set, as soon as CRIU has registered a process's memory (while CRIU continues with
the rest); single faults in between; once the owner reports the first token, the pages of the next requests; then all
other pages, at a limited rate (checkpoint.lazy_pages.copier). When every page of every process is in place, the owner
closes its descriptors first, then this side closes its own.

Why memory cannot be corrupted:
- One thread reads the events and places the pages, so no event is read between looking a page up and placing it. The
  kernel refuses to place anything (EAGAIN) while an announced change is unread, and a process that drops pages waits
  until then.
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
from typing import cast

from checkpoint.criu.pagemap import PAGE, ProcessImage, argument_pages
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import ProcessGone, ProcessTree, Space, TryAgain, zero_source
from checkpoint.lazy_pages.copier import Copier, Planner
from checkpoint.lazy_pages.copy_plan import PendingPages
from checkpoint.lazy_pages.filler import Filler
from checkpoint.lazy_pages.read_order import ColdReads, namespace_of
from checkpoint.lazy_pages.readahead import DownloadingSource, DownloadWaiter, Fetcher, Waker
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.lazy_pages.working_set import BadWorkingSet, Range, WorkingSet

# Sent by CRIU instead of a process number when every process runs (LAZY_PAGES_RESTORE_FINISHED in criu/uffd.c).
_RESTORED = 0x52535446
# A fault outside the working set also brings its neighbours in a block of this size.
_NEIGHBOURS = 64 << 10
# Size of the block of neighbours that is recorded for the next restore.
_RECORDED_NEIGHBOURS = 16 << 10
_RETRY_S = 0.0005
# Timeout at the end for writing the caches: some 100 MB to disk, once.
_WRITE_TIMEOUT_S = 1.0


class FaultHandler:
    """Serves one process tree (see the module's docstring).

    `control` and `listener` are the owner's sockets, `config` is described in client.server_config. `cold_reads`: the
    reads that were requested from a cold disk.
    """

    def __init__(
        self, control: socket.socket, listener: socket.socket, config: dict[str, object], cold_reads: ColdReads | None
    ) -> None:
        self.listener = listener
        self.images_dir = str(config["images"])
        self.first_token_timeout_s = float(str(config["first_token_timeout_s"]))
        self.tree = ProcessTree(control, bool(config["record"]))
        self.stats, self.spaces, self.epoll = self.tree.stats, self.tree.spaces, self.tree.epoll
        self.waker = Waker()
        self.criu: socket.socket | None = None
        self.released: set[int] = set()  # spaces that need nothing more, as reported to the owner
        self.first_token_limit = 0.0
        self.fill = bool(config.get("fill"))  # before any process runs, all pages are in place …
        self.fill_only = frozenset(cast("list[int]", config.get("fill_only") or []))  # … or those of these processes
        self.filled = False
        self.filler = Filler(self.waker.wake)
        self.faults: deque[tuple[Space, int, float]] = deque()  # (space, address, since when)
        self.trace_before: list[tuple[int, int]] = []  # (process, address) of faults before the first token
        self.trace_after: list[tuple[int, int]] = []
        residency = ResidencyBitmap.open(str(config["downloading"])) if config.get("downloading") else None
        self.planner = Planner(self.images_dir, residency)
        self.images = self.planner.images
        if self.fill:
            for image in filter(self.fills, self.images.values()):
                self.filler.expect(image.pid, image.runs, self.planner.source(image))
        self.zeros = zero_source()
        self.working_set = self.load_working_set(str(config["working_set"] or ""))
        wake = self.waker.wake
        # Reads for single faults.
        self.fault_fetcher = DownloadWaiter(wake, self.request_download) if residency else Fetcher("faults", wake)
        self.fault_jobs: dict[int, tuple[Space, int, float]] = {}
        self.fault_job = 0
        ahead = DownloadWaiter(wake) if residency else Fetcher("ahead", wake)
        rate = float(str(config["rest_bytes_per_s"]))
        self.copier = Copier(self.tree, self.planner, self.working_set, ahead, cold_reads, rate)
        for fetcher in (self.fault_fetcher, ahead):
            fetcher.start()
        if cold_reads:
            cold_reads.listen(wake)
        try:
            self.copier.begin_startup(
                self.argument_ranges() if self.tree.record else self.working_set.before_first_token
            )
        except BaseException:
            self.close()
            raise

    def load_working_set(self, path: str) -> WorkingSet:
        """Load the recorded working set; if it is missing or damaged, warn and return an empty one."""
        if not path or not os.path.exists(path):
            return WorkingSet()
        try:
            return self.planner.working_set(path)
        except BadWorkingSet as error:
            self.tree.send(
                event="warning", message=f"{error}; restoring without it, and the next restore records it again"
            )
            with contextlib.suppress(OSError):
                os.unlink(path)
            return WorkingSet()
        except OSError as error:
            self.tree.send(event="warning", message=f"{error}; restoring without it")
            return WorkingSet()

    def argument_ranges(self) -> list[Range]:
        """Return the ranges of the processes' command lines and environments.

        /proc cannot show them until they are in place.
        """
        found = [
            (pid, *argument_pages(self.images_dir, pid)) for pid in self.images if not self.fills(self.images[pid])
        ]
        return [(pid, low, high) for pid, start, end in found for low, high in self.images[pid].split(start, end)]

    def request_download(self, path: str, offset: int, length: int) -> None:
        """Ask the owner for bytes that a fault waits for and that have not arrived."""
        self.tree.send(event="wanted", path=path, offset=offset, length=length)

    # The loop

    def run(self) -> None:
        """Run until every page is in place or the owner is gone."""
        tree = self.tree
        self.stats.listening_s = tree.now()
        tree.send(event="listening")
        for fd in (tree.control.fileno(), self.listener.fileno(), self.waker.fd):
            self.epoll.register(fd, select.EPOLLIN)
        while True:
            ready = self.epoll.poll(self.timeout(time.monotonic()))
            since = time.monotonic()
            for fd, _ in ready:
                if fd in self.spaces:
                    self.read_events(self.spaces[fd], since)
                elif fd == tree.control.fileno():
                    if not self.read_owner():
                        return
                elif fd == self.waker.fd:
                    os.eventfd_read(fd)
                    self.collect()
                elif fd == self.listener.fileno():
                    self.accept()
                elif self.criu is not None and fd == self.criu.fileno():
                    self.read_criu(self.criu)
            self.serve_faults()
            if self.waits_for_first_token() and time.monotonic() > self.first_token_limit:
                tree.send(
                    event="warning",
                    message=f"no first token within {self.first_token_timeout_s:.0f} s; background pages are copied now",
                )
                self.on_first_token()
            if not self.fill or self.filled:  # else it would take the filling threads' time
                self.copier.step(time.monotonic())
                while self.copier.advance():
                    pass
            if self.copier.finished or (self.fill and tree.restored):
                self.release()
            if self.fill and not self.filled and tree.restored and not any(map(self.fills, self.spaces.values())):
                self.filled = True
                tree.send(event="filled")
            if tree.restored and not self.spaces:
                tree.send_stats("complete")
                return

    def timeout(self, now: float) -> float:
        """Return how long the loop may sleep: at most until the next extent may be placed; -1 for no limit."""
        limits = self.copier.waits(now) if not self.fill or self.filled else []
        if self.faults:
            limits.append(_RETRY_S)
        if self.waits_for_first_token():
            limits.append(max(0.0, self.first_token_limit - now))
        return min(limits, default=-1)

    def waits_for_first_token(self) -> bool:
        return self.tree.restored and not self.tree.first_token and (not self.fill or bool(self.fill_only))

    def fills(self, one: ProcessImage | Space) -> bool:
        """Return whether all pages of a process are put in place before it runs."""
        return self.fill and (not self.fill_only or one.pid in self.fill_only)

    def collect(self) -> None:
        """Collect the results of the fetchers and the filler."""
        for space, size in self.filler.collect():
            space.fill()
            self.stats.bytes_ahead += size
        self.copier.collect()
        finished, cold = self.fault_fetcher.collect()
        self.stats.bytes_cold += cold
        self.faults.extend(self.fault_jobs.pop(number) for number in finished)

    # Messages from the owner and CRIU

    def read_owner(self) -> bool:
        """Handle a message from the owner. Return False if it is gone, and with it the sandbox."""
        try:
            data = self.tree.control.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            return False
        message = json.loads(data)
        if message["op"] == "first-token":
            self.on_first_token()
        elif message["op"] == "requests-done":
            self.on_first_token()
            self.tree.after_requests = True
            if message["save"]:
                self.save(message["save"])
        elif message["op"] == "requests":
            self.copier.requests_there = message["there"]
        elif message["op"] == "arrived":
            for waiter in (self.fault_fetcher, self.copier.fetcher):
                if isinstance(waiter, DownloadWaiter):
                    waiter.check()
        elif message["op"] == "released":
            for space in [space for space in self.spaces.values() if space.number == message["number"]]:
                self.tree.drop(space)
        elif message["op"] == "stats":
            self.tree.send_stats("stats")
        return True

    def on_first_token(self) -> None:
        if not self.tree.first_token:
            self.tree.first_token = True
            self.stats.faults_before_first_token = self.stats.faults

    def save(self, path: str) -> None:
        """Write the recorded working set, or the known one with the faults that it missed."""
        base = None if self.tree.record else self.working_set
        shown = [(pid, page) for pid, start, end in self.argument_ranges() for page in range(start, end, PAGE)]
        found = WorkingSet.from_faults(self.trace_before + shown, self.trace_after, self.images, base)
        try:
            found.save(path)
        except OSError as error:
            self.tree.warn("the working set is not kept", error)
            return
        self.tree.send(event="saved", path=path, ranges=len(found.ranges), first=found.first)

    def accept(self) -> None:
        self.criu, _ = self.listener.accept()
        self.tree.namespace = namespace_of(self.criu)
        self.epoll.unregister(self.listener.fileno())
        self.listener.close()
        self.epoll.register(self.criu.fileno(), select.EPOLLIN)

    def read_criu(self, criu: socket.socket) -> None:
        """Handle a message from CRIU: a process and its userfaultfd, or the end of the restore."""
        data = criu.recv(4, socket.MSG_WAITALL)
        if len(data) < 4:
            # If CRIU failed, the owner sees its exit code and log, and closes the control socket.
            self.epoll.unregister(criu.fileno())
            criu.close()
            self.criu = None
            return
        (number,) = struct.unpack("<i", data)
        if number == _RESTORED:
            self.tree.restored = True
            self.stats.restored_s = self.tree.now()
            self.first_token_limit = time.monotonic() + self.first_token_timeout_s
            for space in self.spaces.values():
                space.settled = True
            self.tree.send(event="restored")
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
            source = self.planner.source(image)
            space = Space(0, number, fds[0], PendingPages(image.runs), image, source)
            self.tree.add(space)
            if self.fills(space):
                self.filler.add(space)

    # Events of the processes

    def read_events(self, space: Space, since: float) -> None:
        try:
            events = uffd.read_events(space.fd)
        except OSError:
            if self.filler.fills(space):  # its descriptor is in use
                raise
            self.tree.drop(space)
            return
        space.changed = space.changed or any(event[0] not in (uffd.PAGEFAULT, uffd.FORK) for event in events)
        for kind, a, b, c in events:
            if kind == uffd.PAGEFAULT:
                address = b & ~(PAGE - 1)
                self.stats.faults += 1
                self.faults.append((space, address, since))
                if not self.tree.after_requests and not self.fills(space):
                    (self.trace_after if self.tree.first_token else self.trace_before).append((space.pid, address))
                continue
            if self.filler.fills(space) and (kind in (uffd.FORK, uffd.REMAP) or space.pending.within(a, b)):
                raise RuntimeError(f"process {space.pid} changed its memory before all of it was in place")
            if kind == uffd.FORK:
                self.stats.forks += 1
                child = Space(0, space.pid, a & 0xFFFFFFFF, space.pending.copy(), space.image, space.source)
                for start, end in space.image.wiped_on_fork:
                    child.pending.cut(start, end)
                child.settled = child.changed = True
                self.tree.add(child)
                continue
            if kind in (uffd.REMOVE, uffd.UNMAP):
                self.stats.removed += 1
                space.pending.cut(a, b)
            elif kind == uffd.REMAP:
                self.stats.moved += 1
                space.pending.move(a, b, c)

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
            except ProcessGone:
                if self.filler.fills(space):
                    raise RuntimeError(f"process {space.pid} ended while its pages were filled") from None
                self.tree.drop(space)
                continue
            except TryAgain:
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
        plan = self.copier.plans.get(space.pid)
        index = plan.find(address) if plan else None
        found = space.rough_pending.find(address)
        if space.changed and not (found and space.is_unmoved(address, address + PAGE, found[2] + address - found[0])):
            index = None
        if plan and index is not None:
            low, high = plan.starts[index], plan.ends[index]
        elif self.tree.record:
            low, high = address, address + PAGE
        else:
            low = address & ~(_NEIGHBOURS - 1)
            high = low + _NEIGHBOURS
            self.stats.faults_missed += found is not None  # fresh memory is in no working set
        if found is None:
            if plan and index is not None:
                self.stats.bytes_zero += space.run(plan, index, self.zeros)
                uffd.wake(space.fd, address, PAGE)
            else:
                following = space.rough_pending.at_or_after(address)
                end = min(high, following[0]) if following else high
                self.stats.bytes_zero += space.zero_fault(address, end)
            self.stats.faults_zero += 1
            return True
        low, high = max(low, found[0]), min(high, found[1])
        if index is None and not (self.tree.record or self.tree.after_requests or self.fills(space)):
            # Record the nearest neighbours, which would be the next restore's faults. Recording all would grow a
            # working set fivefold.
            trace = self.trace_after if self.tree.first_token else self.trace_before
            first = address & ~(_RECORDED_NEIGHBOURS - 1)
            trace.extend(
                (space.pid, page) for page in range(max(low, first), min(high, first + _RECORDED_NEIGHBOURS), PAGE)
            )
        offset = found[2] + low - found[0]
        if (
            index is None
            and isinstance(space.source, DownloadingSource)
            and not space.source.resident(offset, high - low)
        ):
            offset, low, high = offset + address - low, address, address + PAGE  # do not wait for the neighbours
        part = (space.source, offset, high - low)
        if plan and index is not None:
            part = self.planner.packed(plan, index) or part
        if not part[0].resident(*part[1:]):
            self.fault_job += 1
            self.fault_jobs[self.fault_job] = (space, address, since)
            self.fault_fetcher.submit(self.fault_job, [part])
            return False
        if plan and index is not None:
            self.stats.bytes_faulted += space.run(plan, index, self.zeros)
        else:
            self.stats.bytes_faulted += space.place(low, high)
        # Wake explicitly: pages that came another way, or mappings that are gone, woke no thread.
        uffd.wake(space.fd, address, PAGE)
        return True

    # The end

    def release(self) -> None:
        """Report the spaces that need nothing more.

        The owner closes its descriptors first; after our close, the kernel serves all faults.
        """
        for space in self.spaces.values():
            if space.number in self.released or not (self.copier.finished or self.fills(space)):
                continue
            if not space.pending:
                self.released.add(space.number)
                self.tree.send(event="placed", number=space.number)

    def close(self) -> None:
        """Close this tree's descriptors and stop the reading threads, without joining.

        The caller closes the control socket and listener.
        """
        self.filler.stop()
        self.tree.close()
        self.fault_fetcher.stop()
        self.copier.stop()
        if self.criu is not None:
            self.criu.close()
        self.planner.wait_written(_WRITE_TIMEOUT_S)
