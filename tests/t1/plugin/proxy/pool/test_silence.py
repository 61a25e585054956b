"""A replica that runs but answers nothing: it gets no new requests, its owner is notified, and its requests are sent again."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from plugin.proxy.pool.silence import Silence
from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import Rig, Seen, Upstream, echo_request, proxy, run, until, upstream

pytestmark = pytest.mark.t1
BODY = json.dumps({"model": "m", "prompt": "x"}).encode()


class Freezes:
    """An engine that answers nothing while it is frozen, and whose generation is slow."""

    def __init__(self, slow_s: float = 0.0) -> None:
        self.thawed, self.slow_s = asyncio.Event(), slow_s
        self.asked = 0

    async def __call__(self, up: Upstream, seen: Seen, reader, writer) -> bool:
        await self.thawed.wait()
        if seen.target == "/v1/models":
            self.asked += 1
        else:
            await asyncio.sleep(self.slow_s)
        return await echo_request(up, seen, reader, writer)


def watched(rig: Rig, name: str, port: int, reported: list[str]):
    replica = rig.add(name, port)
    replica.killed_when_silent = True
    replica.kill_reason = lambda: "silent" if name in reported else ""
    return replica


@asynccontextmanager
async def watching(rig: Rig, limit_s: float, reported: list[str]):
    silence = asyncio.create_task(Silence(rig.pool, limit_s, lambda replica, why: reported.append(replica.name)).run())
    try:
        yield
    finally:
        silence.cancel()
        await asyncio.gather(silence, return_exceptions=True)


@pytest.mark.slow
def test_a_silent_replica_gets_no_requests_and_another_answers_its_own():
    async def main():
        reported: list[str] = []
        frozen = Freezes()
        async with upstream(frozen) as one, upstream() as two, proxy() as rig, watching(rig, 0.9, reported):
            bad = watched(rig, "bad", one.port, reported)
            bodies = [BODY, BODY]
            asked = [asyncio.create_task(rig.get("/v1/completions", method="POST", body=b)) for b in bodies]
            await until(lambda: bad.outstanding == 2)
            watched(rig, "good", two.port, reported)
            await until(lambda: bad.tracker.phase is Phase.SUSPECT)
            assert not reported, "first it is only suspect"
            for n in range(4):
                assert (await rig.get(f"/new/{n}")).status == 200
            assert {s.target for s in two.seen} == {f"/new/{n}" for n in range(4)}
            await until(lambda: reported == ["bad"])
            bad.tracker.to(Phase.FAILED, "replica-silent")  # as an owner does: kill it
            for client in rig.server.clients:
                if client.exchange is not None and client.exchange.connection is not None:
                    client.exchange.connection.transport.abort()
            got = await asyncio.gather(*asked)
            assert {a.status for a in got} == {200} and all(a.json()["length"] == len(BODY) for a in got)
            await asyncio.sleep(0.5)
            assert reported == ["bad"], "logged once"

    run(main())


@pytest.mark.slow
def test_requests_other_than_generations_are_not_sent_again():
    async def main():
        reported: list[str] = []
        async with upstream(Freezes()) as one, upstream() as two, proxy() as rig, watching(rig, 0.6, reported):
            bad = watched(rig, "bad", one.port, reported)
            asked = asyncio.create_task(rig.get("/v1/files", method="POST", body=BODY))
            await until(lambda: bad.outstanding == 1)
            watched(rig, "good", two.port, reported)
            await until(lambda: reported == ["bad"])
            bad.tracker.to(Phase.FAILED, "replica-silent")
            next(iter(rig.server.clients)).exchange.connection.transport.abort()
            assert (await asked).status == 502 and not two.seen

    run(main())


@pytest.mark.slow
def test_an_engine_that_computes_longer_than_the_limit_is_not_suspect():
    async def main():
        reported: list[str] = []
        busy = Freezes(slow_s=2.0)
        busy.thawed.set()
        async with upstream(busy) as up, proxy() as rig, watching(rig, 0.6, reported):
            replica = watched(rig, "busy", up.port, reported)
            got = await rig.get("/v1/completions", method="POST", body=BODY)
            assert got.status == 200 and not reported and replica.tracker.phase is Phase.SERVING
            assert 1 <= busy.asked <= 40, "probed only while suspect"
            await asyncio.sleep(0.4)
            asked = busy.asked
            await asyncio.sleep(0.6)
            assert busy.asked == asked, "an idle replica is not probed"

    run(main())


@pytest.mark.slow
def test_a_replica_that_answers_again_serves_again():
    async def main():
        reported: list[str] = []
        engine = Freezes()
        async with upstream(engine) as up, proxy() as rig, watching(rig, 6.0, reported):
            replica = watched(rig, "r", up.port, reported)
            first = asyncio.create_task(rig.get("/v1/completions", method="POST", body=BODY))
            await until(lambda: replica.tracker.phase is Phase.SUSPECT)
            second = asyncio.create_task(rig.get("/second"))
            await until(lambda: rig.pool.held == 1)
            engine.thawed.set()
            assert (await first).status == 200 and (await second).status == 200
            assert replica.tracker.phase is Phase.SERVING and not reported

    run(main())


@pytest.mark.slow
def test_disconnecting_clients_do_not_hide_a_silent_replica():
    async def main():
        reported: list[str] = []
        async with upstream(Freezes()) as up, proxy() as rig, watching(rig, 0.9, reported):
            replica = watched(rig, "r", up.port, reported)
            asked = asyncio.create_task(rig.get("/v1/completions", method="POST", body=BODY))
            await until(lambda: len(up.seen) > 1)
            asked.cancel()
            await until(lambda: replica.outstanding == 0)
            await until(lambda: reported == ["r"])

    run(main())


def test_a_body_that_follows_its_head_is_kept():
    async def main():
        reported: list[str] = []
        async with upstream() as up, proxy() as rig:
            watched(rig, "r", up.port, reported)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
            writer.write(head + BODY[:3])
            await until(lambda: rig.pool.outstanding == 1)
            await asyncio.sleep(0.05)
            assert not up.seen, "an incomplete body has not been sent to the engine"
            writer.write(BODY[3:])
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()
            assert up.seen[0].body == BODY

    run(main())


@pytest.mark.slow
def test_a_replica_with_pending_pages_is_not_suspect():
    async def main():
        reported: list[str] = []
        async with upstream(Freezes()) as up, proxy() as rig, watching(rig, 0.3, reported):
            replica = watched(rig, "r", up.port, reported)
            replica.pages_pending = lambda: True
            asked = asyncio.create_task(rig.get("/x"))
            await asyncio.sleep(0.8)
            assert not reported and replica.tracker.phase is Phase.SERVING
            asked.cancel()

    run(main())
