"""An endpoint that others start and end: its phase follows without any request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from launchers.bare import free_port
from plugin.proxy.endpoints.endpoint import Endpoint, EndpointSpec
from plugin.proxy.endpoints.models_file import ModelConfig, spec_of
from plugin.proxy.endpoints.watch import WatchIntervals
from plugin.proxy.http.address import tcp
from plugin.runtime.phases import Phase
from tests.kits.proxy.commands import ENGINE
from tests.kits.proxy.endpoints import SleepMode, in_front_of
from tests.kits.proxy.rig import Seen, Upstream, answer, echo_request, run, until, upstream

pytestmark = pytest.mark.t1

QUICK = WatchIntervals(every_s=0.02, probe_every_s=0.05, unready_s=0.2, unready_busy_s=0.6, connect_s=1.0)


@contextlib.contextmanager
def engine(port: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", str(ENGINE), str(port)]) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def test_a_later_start_and_a_kill_are_detected_without_a_request():
    async def main():
        port = free_port()
        async with in_front_of(EndpointSpec(tcp("127.0.0.1", port), intervals=QUICK)) as (rig, endpoint):
            assert endpoint.tracker.phase is Phase.ASLEEP
            assert (await rig.get("/-/ready")).status == 200 and (await rig.get("/-/ready?strict=1")).status == 503
            for _ in range(2):
                with engine(port) as process:
                    await until(lambda: endpoint.tracker.phase is Phase.SERVING, "it is found up")
                    assert (await rig.get("/-/ready?strict=1")).status == 200
                    os.kill(process.pid, signal.SIGKILL)
                    await until(lambda: endpoint.tracker.phase is Phase.FAILED, "it is found gone")
                assert "engine-gone" in endpoint.tracker.reason
                assert (await rig.get("/-/ready")).status == 200 and (await rig.get("/-/ready?strict=1")).status == 503
            waiting = asyncio.create_task(rig.get("/x"))
            await until(lambda: rig.pool.held == 1)
            with engine(port):
                assert (await waiting).status == 200
            assert rig.pool.waker.wakes == 1 and not rig.pool.waker.failed_starts

    run(main())


@pytest.mark.slow
def test_a_frozen_engine_is_lost_and_found_again():
    async def main():
        port = free_port()
        with engine(port) as process:
            spec = EndpointSpec(tcp("127.0.0.1", port), intervals=QUICK)
            async with in_front_of(spec) as (_, endpoint):
                await until(lambda: endpoint.tracker.phase is Phase.SERVING)
                os.kill(process.pid, signal.SIGSTOP)
                await until(lambda: endpoint.tracker.phase is Phase.FAILED, "it listens, and is not ready")
                assert "not ready for" in endpoint.tracker.reason
                os.kill(process.pid, signal.SIGCONT)
                await until(lambda: endpoint.tracker.phase is Phase.SERVING)

    run(main(), limit_s=60)


@pytest.mark.slow
def test_a_busy_engine_with_a_slow_health_page_keeps_serving():
    unready = False

    async def busy(up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target == "/health" and unready:
            writer.write(answer(b"busy", "503 Service Unavailable"))
            return True
        if seen.target == "/long":
            await asyncio.sleep(0.4)
        return await echo_request(up, seen, reader, writer)

    async def main():
        nonlocal unready
        async with upstream(busy) as up:
            spec = EndpointSpec(tcp("127.0.0.1", up.port), intervals=WatchIntervals(0.02, 0.02, 2, 0.1, 30.0, 1.0))
            async with in_front_of(spec) as (rig, endpoint):
                unready = True
                assert (await rig.get("/long")).status == 200
                assert endpoint.tracker.phase is Phase.SERVING, "it had a request all the time"
                await until(lambda: endpoint.tracker.phase is Phase.FAILED)

    run(main())


def test_an_engine_put_to_sleep_does_not_count_as_serving():
    async def main():
        mode = SleepMode()
        async with upstream(mode) as up:
            base = f"http://127.0.0.1:{up.port}"
            spec = EndpointSpec(
                tcp("127.0.0.1", up.port), wake_url=f"{base}/wake_up", sleep_url=f"{base}/sleep", intervals=QUICK
            )
            async with in_front_of(spec) as (rig, endpoint):
                assert await rig.pool.sleep() and endpoint.tracker.phase is Phase.ASLEEP
                connections = up.connections
                await asyncio.sleep(10 * QUICK.every_s)
                assert endpoint.tracker.phase is Phase.ASLEEP and up.connections == connections
                assert (await rig.get("/-/ready")).status == 200, "a request wakes it"
                assert (await rig.get("/x")).status == 200 and mode.asked_asleep == 0

    run(main())


@pytest.mark.slow
def test_an_engine_that_listens_without_generating_is_probed_less_and_less():
    async def main():
        mode = SleepMode(awake=False)
        async with upstream(mode) as up:
            spec = EndpointSpec(
                tcp("127.0.0.1", up.port), ready_model="m", intervals=WatchIntervals(every_s=0.02, probe_every_s=30.0)
            )
            async with in_front_of(spec) as (_, endpoint):
                asked = [s for s in up.seen if s.target == "/v1/completions"]
                await asyncio.sleep(0.7)
                more = [s for s in up.seen if s.target == "/v1/completions"][len(asked) :]
                assert 1 <= len(more) <= 5, "after 0.04, 0.08, 0.16, 0.32 s"
                assert endpoint.tracker.phase is Phase.ASLEEP

    run(main())


def test_an_engine_that_only_the_proxy_starts_is_not_probed():
    for model in (ModelConfig(command="x"), ModelConfig(snapshot="x")):
        assert spec_of(model, None).exclusive_port
    assert not spec_of(ModelConfig(upstream="http://127.0.0.1:1"), None).exclusive_port

    async def main():
        async with upstream() as up:
            spec = EndpointSpec(
                tcp("127.0.0.1", up.port), wake="exit 1", exclusive_port=True, ready_path="/later", intervals=QUICK
            )
            async with in_front_of(spec) as (_, endpoint):
                endpoint.tracker.to(Phase.FAILED, "x")
                seen = len(up.seen)
                await asyncio.sleep(10 * QUICK.every_s)
                assert len(up.seen) == seen and endpoint.tracker.phase is Phase.FAILED

    run(main())


@pytest.mark.slow
def test_without_a_wake_no_time_is_promised():
    from plugin.proxy.settings import Settings

    async def main():
        port = free_port()
        with_wake = EndpointSpec(tcp("127.0.0.1", port), wake="sleep 30", intervals=QUICK)
        for spec, words in (
            (EndpointSpec(tcp("127.0.0.1", port), intervals=QUICK), "not started from here"),
            (with_wake, "waking,"),
        ):
            async with in_front_of(spec, Settings(early_stream=True, hold_timeout_s=0.3)) as (rig, _):
                body = b'{"stream":true}'
                got = await rig.get("/v1/completions", "Content-Type: application/json", method="POST", body=body)
                assert words.encode() in got.body, got.body
                assert (b"waking" in got.body) is (spec is with_wake), got.body

    run(main())


@pytest.mark.slow
def test_without_a_wake_retry_after_is_short_and_no_start_is_measured():
    """A wait there says nothing about the next start."""

    async def main():
        port = free_port()
        async with in_front_of(EndpointSpec(tcp("127.0.0.1", port), intervals=QUICK)) as (rig, endpoint):
            for wait in ("0", "0.3"):
                got = await rig.get("/x", f"Prefer: wait={wait}")
                assert got.status == 503 and got.json()["error"]["code"] == "hold-deadline"
                assert got.headers["retry-after"] == "5"
            (pool,) = (await rig.get("/-/status")).json()["pools"]
            assert pool["progress"]["phase"] == "starting", "a request has waited"
            assert pool["progress"]["expected_s"] is pool["progress"]["left_s"] is None
            waiting = asyncio.create_task(rig.get("/x"))
            await until(lambda: rig.pool.held == 1)
            with engine(port):
                assert (await waiting).status == 200
            (pool,) = (await rig.get("/-/status")).json()["pools"]
            assert pool["starts"] == {} and pool["progress"]["left_s"] == 0.0

    run(main())


def test_a_port_taken_by_another_user_during_the_probe_is_not_trusted(monkeypatch):
    looks = []

    def seen_at_the_second_check(port: int, pid: int | None) -> int | None:
        looks.append(port)
        return 65534 if len(looks) > 1 else None

    monkeypatch.setattr("plugin.proxy.endpoints.port_owner.foreign_listener", seen_at_the_second_check)

    async def main():
        async with upstream() as up:
            endpoint = Endpoint("default", EndpointSpec(tcp("127.0.0.1", up.port), wake="exit 1", exclusive_port=True))
            why = await endpoint.ready()
            assert why is not None and "engine-port-taken: user 65534" in why and len(up.seen) == 1
            assert "engine-port-taken" in (await endpoint.ready() or "") and len(up.seen) == 1, (
                "and it is not probed again"
            )

    run(main())
