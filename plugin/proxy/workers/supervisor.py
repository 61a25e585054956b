"""Run several worker processes on one port (SO_REUSEPORT) that share one set of pools, and so one wake.

The supervisor owns the pools and the listening sockets. Each worker has a mirror of every pool, updated by JSON lines
over a socket pair. A worker that needs a wake asks the supervisor, whose pool runs one wake for all. Before the pool
sleeps, every worker stops new requests and reports whether it is idle. A busy worker keeps the pool awake; when the
pool must make room for another, the supervisor waits for that worker instead.

Guarantees: a worker that dies is replaced on the same socket, so the connections in its backlog are served. A worker
that gets SIGTERM is replaced at once, and finishes its requests in flight. When the supervisor dies, its workers end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from plugin.proxy.admin import costs
from plugin.proxy.admin.actions import act
from plugin.proxy.admin.endpoints import pool_document
from plugin.proxy.admin.stats import merged
from plugin.proxy.errors import ProxyError, StartFailed, Unavailable
from plugin.proxy.pool import adapters
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import Replica
from plugin.proxy.pool.start_times import Kind
from plugin.proxy.settings import Settings
from plugin.proxy.workers.control import LONGEST_LINE, REPLY_S, ControlChannel, error_message
from plugin.runtime.listening import url
from plugin.runtime.phases import Phase
from plugin.startup.own_module import own_module

log = logging.getLogger("quickthaw.proxy")

_RESPAWN_S = (0.1, 0.5, 2.0, 10.0)


@dataclasses.dataclass
class _Worker:
    number: int
    sock: socket.socket
    process: asyncio.subprocess.Process | None = None
    control: ControlChannel | None = None
    leaving: bool = False
    busy: dict[str, int] = dataclasses.field(default_factory=dict)
    counted: dict[str, Any] | None = None
    """Its document as last seen."""


class Supervisor:
    """Own the pools that workers share: one worker per listening socket."""

    def __init__(
        self,
        pools: Sequence[ReplicaPool],
        settings: Settings,
        sockets: Sequence[socket.socket],
        *,
        config: str | None = None,
        admin_sock: socket.socket | None = None,
        log: tuple[str, str] = ("info", "auto"),
    ) -> None:
        """Create the supervisor; `start` starts the workers.

        `sockets` are bound and listening, one per worker. `config` is the path of the models' file, if there are
        several models. `admin_sock` serves the admin endpoints, if they have a port of their own. `log` is the level and
        the format of the workers' logs.
        """
        self.admin_sock, self.log = admin_sock, log
        self.pools = {pool.name: pool for pool in pools}
        self.settings, self.config = settings, config
        self.workers = [_Worker(n, sock) for n, sock in enumerate(sockets)]
        """The running workers, including replaced ones that still finish their requests (`leaving`)."""
        self.listens_at = url(sockets[0])
        self._stop_limit_s: float | None = None
        """Seconds that requests in flight have once a stop has begun."""
        self._ended = merged([])
        """The counters of workers that have ended, so that none goes back."""
        self.started_at = time.time()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Bind the pools to this loop, start the workers, and return when each has reported ready. Raises TimeoutError after 60 s."""
        loop = asyncio.get_running_loop()
        for pool in self.pools.values():
            pool.bind(loop, max_held=1 << 30, max_hold_s=86400.0)
            pool.busy_elsewhere = lambda name=pool.name: sum(w.busy.get(name, 0) for w in self.workers)  # type: ignore[misc]
            pool.on_phase.append(lambda replica, new, reason, pool=pool: self._send_phase(pool, replica, new, reason))  # type: ignore[misc]
            pool.waker.on_failed.append(lambda error, pool=pool: self._send_failed(pool, error))  # type: ignore[misc]
            pool.sleeper.wrap_hook(lambda inner, pool=pool: self._sleep_when_quiet(pool, inner))  # type: ignore[misc]
            if pool.sleeper.watches:
                self._tasks.append(loop.create_task(pool.sleeper.watch_idle()))
        ready = [loop.create_future() for _ in self.workers]
        for worker, future in zip(self.workers, ready, strict=True):
            self._tasks.append(loop.create_task(self._keep(worker, future)))
        async with asyncio.timeout(60.0):
            await asyncio.gather(*ready)

    @property
    def stopping(self) -> bool:
        """Return whether a stop has begun."""
        return self._stop_limit_s is not None

    async def shutdown(self, limit_s: float) -> None:
        """Stop all workers in order: requests in flight may finish within `limit_s` seconds, held ones get a 503."""
        self._stop_limit_s = limit_s
        for pool in self.pools.values():
            pool.close(Unavailable("shutting-down", "the proxy is shutting down"))
        for worker in tuple(self.workers):
            if worker.control is not None:
                worker.control.send(op="shutdown", limit_s=limit_s)
            worker.sock.close()  # a listening socket accepts for as long as any process has it open
        if self.admin_sock is not None:
            self.admin_sock.close()
        processes = [w.process for w in self.workers if w.process is not None]
        try:
            async with asyncio.timeout(limit_s + 5.0):
                await asyncio.gather(*(p.wait() for p in processes))
        except TimeoutError:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    process.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            *self._tasks, *(pool.wait_settled() for pool in self.pools.values()), return_exceptions=True
        )

    def kill(self) -> None:
        """Kill all workers at once."""
        for worker in self.workers:
            if worker.process is not None and worker.process.returncode is None:
                worker.process.kill()

    # -- internals ---------------------------------------------------------------------------------

    async def _keep(self, worker: _Worker, ready: asyncio.Future[None]) -> None:
        """Run one worker and restart it whenever it ends, until the supervisor stops."""
        tries = 0
        while True:
            began = time.monotonic()
            try:
                await self._run(worker, ready)
            except Exception as error:
                fields = {"worker": worker.number, "reason": f"{error!r}"}
                log.exception("worker %d: %s", worker.number, error, extra={"event": "worker-failed", "fields": fields})
            if self.stopping:
                return
            if worker.leaving:
                self.workers.remove(worker)
                return
            tries = 0 if time.monotonic() - began > 30 else tries + 1
            fields = {"worker": worker.number}
            log.error("worker %d ended", worker.number, extra={"event": "worker-ended", "fields": fields})
            await asyncio.sleep(_RESPAWN_S[min(tries, len(_RESPAWN_S) - 1)])

    async def _run(self, worker: _Worker, ready: asyncio.Future[None]) -> None:
        if self.stopping:
            return
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), worker.sock.fileno()]
        if self.admin_sock is not None and worker.number == 0:
            fds.append(self.admin_sock.fileno())
        try:
            worker.process = process = await asyncio.create_subprocess_exec(
                *own_module("plugin.proxy.workers.worker"),
                *map(str, fds),
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        worker.control = control = ControlChannel(reader, writer)
        control.send(
            op="hello",
            settings=self._settings(),
            config=self.config,
            log=self.log,
            pools=[self._mirror(p) for p in self.pools.values()],
        )
        if self._stop_limit_s is not None:  # the stop began while it started: nobody has told it
            control.send(op="shutdown", limit_s=self._stop_limit_s)

        def handle(message: dict[str, Any]) -> Awaitable[Any] | None:
            if message["op"] == "ready":
                if not ready.done():
                    ready.set_result(None)
            elif message["op"] == "busy":
                self._busy(worker, message)
            elif message["op"] == "leaving":
                self._replace(worker)
            elif message["op"] == "wake":
                return self._wake(message)
            elif message["op"] == "gather":
                return self._gather()
            elif message["op"] == "act":
                return self._act(message)
            elif message["op"] == "signed-out":
                self._broadcast(worker, message)
            return None

        try:
            await control.run(handle)
        finally:
            worker.control = None
            worker.busy = {}
            if worker.counted is not None:
                self._ended, worker.counted = merged([self._ended, worker.counted]), None
            if process.returncode is None:
                if not self.stopping:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        process.terminate()
                await process.wait()

    def _broadcast(self, sender: _Worker, message: dict[str, Any]) -> None:
        """Send a worker's message to all other workers."""
        for worker in self.workers:
            if worker is not sender and worker.control is not None:
                worker.control.send(**message)

    def _replace(self, worker: _Worker) -> None:
        """Start a replacement for a worker that got SIGTERM and is finishing its requests."""
        if self.stopping or worker.leaving:
            return
        worker.leaving = True
        fields = {"worker": worker.number}
        log.warning(
            "worker %d got SIGTERM and finishes its requests; it is replaced",
            worker.number,
            extra={"event": "worker-leaving", "fields": fields},
        )
        fresh = _Worker(worker.number, worker.sock)
        self.workers.append(fresh)
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._keep(fresh, loop.create_future())))

    def _settings(self) -> dict[str, Any]:
        values = dataclasses.asdict(self.settings)
        for name in ("denied_paths", "allowed_paths", "wake_on"):
            values[name] = sorted(values[name])
        return values

    def _mirror(self, pool: ReplicaPool) -> dict[str, Any]:
        replicas = [
            {
                "name": r.name,
                "phase": str(r.tracker.phase),
                **_place(r),
            }
            for r in pool.replicas.values()
        ]
        history = {str(kind): list(pool.history.seen(kind)) for kind in Kind}
        return {
            "name": pool.name,
            "wakes": pool.waker.hook is not None,
            "started_here": pool.started_here,
            "replicas": replicas,
            "history": history,
        }

    def _send_phase(self, pool: ReplicaPool, replica: Replica, new: Phase, reason: str) -> None:
        for worker in self.workers:
            if worker.control is not None:
                worker.control.send(
                    op="phase",
                    pool=pool.name,
                    replica=replica.name,
                    to=str(new),
                    reason=reason,
                    **_place(replica),
                )

    def _send_failed(self, pool: ReplicaPool, error: ProxyError) -> None:
        for worker in self.workers:
            if worker.control is not None:
                worker.control.send(op="failed", pool=pool.name, **error_message(error))

    def _busy(self, worker: _Worker, message: dict[str, Any]) -> None:
        worker.busy = message["pools"]
        for name, replicas in message["adapters"].items():
            for replica in replicas:
                if replica in self.pools[name].replicas:
                    adapters.mark_loaded(self.pools[name], self.pools[name].replicas[replica])
        for name, count in worker.busy.items():
            if count:
                self.pools[name].last_active = time.monotonic()

    async def _wake(self, message: dict[str, Any]) -> dict[str, Any] | None:
        pool = self.pools[message["pool"]]
        for name, generation in message["refused"]:
            if name in pool.replicas:
                pool.refused(pool.replicas[name], generation, "a worker could not connect")
        try:
            await pool.wake()
        except ProxyError as error:
            return error_message(error)
        return None

    async def _act(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"phase": await act(self.pools[message["pool"]], message["action"])}
        except ProxyError as error:
            return error_message(error)

    async def _sleep_when_quiet(self, pool: ReplicaPool, sleep: Callable[[], Awaitable[None]]) -> None:
        controls = [w.control for w in self.workers if w.control is not None]
        wait = pool.sleeper.evicting
        try:
            limit_s = REPLY_S + (pool.sleeper.drain_limit_s if wait else 0.0)
            asked = asyncio.gather(
                *(control.request(limit_s, op="quiet", pool=pool.name, wait=wait) for control in controls)
            )
            try:
                quiet = all(await pool.sleeper.wait_drained(asked))
            except TimeoutError:
                raise StartFailed("worker-silent", "a worker did not report whether it has requests for it") from None
            if not quiet:
                raise StartFailed("busy", "a worker has a request for it")
            pool.sleeper.refuse_loaded()
            await sleep()
            await asyncio.sleep(0)  # the phase change, queued on the loop, must be sent before the release
        finally:
            for control in controls:
                control.send(op="release", pool=pool.name)

    async def _gather(self) -> dict[str, Any]:
        """Merge the documents of all workers: sum their counters, and add their requests to this process's pools.

        A worker that does not answer counts as it was last seen.
        """
        documents: list[dict[str, Any]] = []

        async def one(worker: _Worker, control: ControlChannel) -> None:
            with contextlib.suppress(TimeoutError, ConnectionError):  # skip a worker that hangs or has ended
                document = await control.request(REPLY_S, op="document")
                documents.append(document)
                if worker.control is control:
                    worker.counted = document

        asked = (one(w, w.control) for w in self.workers if w.control is not None)
        await asyncio.gather(costs.measure(self.pools.values()), *asked)
        pools = []
        for pool in self.pools.values():
            document = pool_document(pool)
            theirs = [p for d in documents for p in d["pools"] if p["name"] == pool.name]
            document["held"] = sum(p["held"] for p in theirs)
            document["outstanding"] = sum(p["outstanding"] for p in theirs)
            for replica in document["replicas"]:
                same = [r for p in theirs for r in p["replicas"] if r["name"] == replica["name"]]
                replica["outstanding"] = sum(r["outstanding"] for r in same)
                replica["served"] = sum(r["served"] for r in same)
            pools.append(document)
        return {
            "host": socket.gethostname(),
            "listens_at": self.listens_at,
            "uptime_s": round(time.time() - self.started_at, 1),
            "draining": self.stopping,
            "workers": len(documents),
            "clients": sum(d["clients"] for d in documents),
            "held_bytes": sum(d["held_bytes"] for d in documents),
            **merged([self._ended, *(w.counted for w in self.workers if w.counted is not None)]),
            "pools": pools,
        }


def _place(replica: Replica) -> dict[str, Any]:
    """Return a replica's generation and address, for its mirrors (`mirror.Mirror`)."""
    upstream = replica.upstream
    return {
        "generation": replica.generation,
        "spec": upstream.spec if upstream else None,
        "authority": (upstream.authority or b"").decode() if upstream else "",
    }


def listening_sockets(host: str, port: int, count: int, backlog: int) -> list[socket.socket]:
    """Return `count` listening sockets that share one port; port 0 takes a free one for all. Raises OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, port))
            port = sock.getsockname()[1]
        for sock in sockets:
            sock.listen(backlog)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets
