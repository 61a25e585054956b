"""An engine that does not sleep, does not drain, or refuses connections: the proxy pauses, logs it once, and answers the other clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from launchers.bare import free_port
from plugin.proxy.pool.backoff import Backoff
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase
from tests.kits.proxy.commands import ENGINE, alive, call, command, models_file
from tests.kits.proxy.rig import Seen, Upstream, echo_request, proxy, run, until, upstream

pytestmark = pytest.mark.t1


def test_pauses_double_up_to_a_limit_and_reset():
    now = 100.0
    backoff = Backoff(1.0, 5.0, lambda: now)
    assert [backoff.failed() for _ in range(4)] == [1, 2, 4, 5] and backoff.left_s == 5
    assert backoff.failed(at_least_s=20) == 20
    backoff.succeeded()
    assert backoff.left_s == 0 and backoff.failed() == 1
    backoff.failed()
    now += 11
    assert backoff.failed() == 1


def count_lines(said: str, word: str) -> int:
    return sum(word in line for line in said.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["daemonises", "hook fails"])
def test_a_model_that_cannot_sleep_is_an_error_for_the_other_without_busy_waiting(tmp_path, how):
    port, pid_file, said = free_port(), tmp_path / "pid", []
    engine = f"{sys.executable} -S {ENGINE} {port} stays"
    stays = (
        f'{{command: "setsid {engine.replace(str(port), "${PORT}")} 2>/dev/null & echo $! > {pid_file}; sleep 1"}}'
        if how == "daemonises"
        else f'{{command: "exec {engine.replace(str(port), "${PORT}")}", sleep_url: "http://127.0.0.1:{port}/nowhere"}}'
    )
    other = f'{{command: "exec {sys.executable} -S {ENGINE} ${{PORT}} other"}}'
    config = models_file(tmp_path, f"max_awake: 1\nmin_awake: 0\nmodels:\n  stays: {stays}\n  other: {other}\n")
    with command("--config", config, "--log-format", "json", kept=said) as (_, url), ended_at_last(pid_file):
        assert call(f"{url}/v1/x", {"model": "stays"})[1]["name"] == "stays"
        if how == "daemonises":
            time.sleep(1.2)  # the command has returned
        codes = set()
        for _ in range(5):
            status, body = call(f"{url}/v1/x", {"model": "other"})
            assert status == 503 and "stays did not go to sleep" in body["error"]["message"], body
            codes.add(body["error"]["code"])
        assert codes == {"no-room"}
        assert call(f"{url}/v1/x", {"model": "stays"})[1]["name"] == "stays", "it keeps serving"
        wakes = {p["name"]: p["wakes"] for p in call(f"{url}/-/status")[1]["pools"]}
        assert wakes["other"] <= 2, "during the pause requests are answered without another try"
    assert count_lines("".join(said), '"sleep-failed"') == 1
    assert len("".join(said)) < 20_000


@contextlib.contextmanager
def ended_at_last(pid_file: Path):
    """Kill the engine of `pid_file`, which no proxy knows of."""
    try:
        yield
    finally:
        if pid_file.exists():
            pid = int(pid_file.read_text())
            if alive(pid) and str(ENGINE).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


async def endless(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer with an endless stream for /endless, a flood for /endless/unread, a WebSocket for /endless/websocket, and otherwise as
    usual.
    """
    if not seen.target.startswith("/endless"):
        return await echo_request(up, seen, reader, writer)
    if "websocket" in seen.target:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        event = b"\x81\x01x"
    else:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        event = b"4\r\n: x\n\r\n"
    while True:
        writer.write(event * 10_000 if "unread" in seen.target else event)
        await writer.drain()
        await asyncio.sleep(0.05)


class Serving:
    """An upstream in its own thread, for tests of the command."""

    def __enter__(self) -> Upstream:
        self._loop, self._started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))
        self._thread.start()
        assert self._started.wait(10)
        return self.up

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        async with upstream(endless) as self.up:
            self._started.set()
            await self._stop.wait()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


@contextlib.contextmanager
def streaming(url: str, model: str, kind: str):
    """Return a client that has read the first bytes of an endless stream, and reads no more of it."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as sock:
        if kind == "websocket":
            head = f"GET /endless/websocket?model={model} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            sock.sendall(
                f"{head}Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            assert sock.recv(4096).startswith(b"HTTP/1.1 101")
        else:
            body = json.dumps({"model": model}).encode()
            head = f"POST /endless/{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        yield sock


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "waits", "kind"),
    [
        ("1", True, "stream"),
        ("1", False, "stream"),
        ("1", True, "websocket"),
        ("1", True, "unread"),
        pytest.param("2", True, "stream", marks=pytest.mark.slow),
        pytest.param("2", False, "stream", marks=pytest.mark.slow),
    ],
)
def test_a_failed_drain_is_an_error_for_waiting_clients_and_the_busy_model_serves_on(tmp_path, workers, waits, kind):
    """Also if the waiting client has left: then the busy model continues at once."""
    other = f'{{command: "exec {sys.executable} -S {ENGINE} ${{PORT}} other"}}'
    with Serving() as up:
        busy = f"http://127.0.0.1:{up.port}"
        drain = 1.0 if waits else 300
        config = models_file(
            tmp_path,
            f"max_awake: 1\nmin_awake: 0\nevict_grace: {drain}\nmodels:\n"
            f'  busy: {{upstream: "{busy}", sleep_url: "{busy}/sleep"}}\n  other: {other}\n',
        )
        with command("--config", config, "--workers", workers) as (_, url), streaming(url, "busy", kind) as stream:
            if waits:
                status, body = call(f"{url}/v1/x", {"model": "other"})
                assert status == 503 and body["error"]["code"] == "no-room", body
                assert "busy did not finish" in body["error"]["message"]
            else:
                request = urllib.request.Request(f"{url}/v1/x", b'{"model": "other"}')
                with pytest.raises((TimeoutError, OSError)):
                    urllib.request.urlopen(request, timeout=1.0)
            assert call(f"{url}/v1/x", {"model": "busy"})[0] == 200, "the busy model takes new requests"
            assert stream.recv(4096), "its stream was not aborted"
            stream.close()


@pytest.mark.slow
def test_a_serving_replica_that_refuses_connections_is_woken_a_few_times(caplog):
    async def main():
        wakes = []

        async def wake() -> None:
            wakes.append(time.monotonic())

        async with proxy(wake=wake) as rig:
            rig.add("r0", free_port())
            waiting = asyncio.create_task(rig.get("/x"))
            await until(lambda: rig.server.stats.upstream_errors["upstream-refused"] >= 3)
            assert len(wakes) <= 3 and rig.server.stats.upstream_errors["upstream-refused"] <= 4
            assert sum("refuses connections" in record.message for record in caplog.records) == 1
            async with upstream() as up:
                rig.pool.replicas["r0"].upstream = rig.add("r1", up.port, phase=Phase.IDLE).upstream
                assert (await waiting).status == 200
                assert rig.pool.replicas["r0"].refusals.failures == 0

    run(main())


@pytest.mark.slow
def test_a_failed_sleep_is_retried_with_growing_pauses(caplog):
    async def main():
        tries = []

        async def sleep() -> None:
            tries.append(time.monotonic())
            raise OSError("no")

        async with upstream() as up, proxy(sleep=sleep, sleep_after_s=0.02) as rig:
            rig.add("r0", up.port)
            await until(lambda: len(tries) == 2)
            await asyncio.sleep(0.3)
            assert len(tries) == 2 and tries[1] - tries[0] > 0.9
            assert rig.pool.sleeper.sleeps == 0, "a failed sleep does not count"
            assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
            assert (await rig.get("/x")).status == 200

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trickles", "waits for us"])
def test_a_trickling_body_ends_after_a_total_limit(how):
    """Each byte is in time, but the body never ends. Time that a client waits for the proxy does not count."""

    async def main():
        slept = asyncio.Event()

        async def sleep() -> None:
            slept.set()

        settings = Settings(body_total_s=0.4, body_timeout_s=3000, body_buffer=1024)
        async with upstream() as up, proxy(settings, sleep=sleep, sleep_after_s=0.2) as rig:
            size = 10 if how == "trickles" else 100_000
            phase = Phase.SERVING if how == "trickles" else Phase.MOUNTING
            rig.add("r", up.port, phase=phase)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST /v1/audio HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
            if how == "trickles":
                for _ in range(size - 1):
                    writer.write(b"x")
                    await asyncio.sleep(0.1)
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408")
                await slept.wait()
                assert up.seen[0].gone
            else:
                writer.write(b"x" * size)
                await asyncio.sleep(0.8)
                for step in (Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                    rig.trackers["r"].to(step)
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()

    run(main())


@pytest.mark.slow
def test_a_kept_client_connection_does_not_delay_the_shutdown():
    async def main():
        gate = asyncio.Event()

        async def gated(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            await gate.wait()
            return await echo_request(up, seen, reader, writer)

        async with upstream(gated) as up, proxy() as rig:
            rig.add("r", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await until(lambda: rig.pool.outstanding == 1)
            ending = asyncio.create_task(rig.server.shutdown(600))
            await asyncio.sleep(0.05)
            gate.set()
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            async with asyncio.timeout(30):
                await ending
            writer.close()

    run(main())
