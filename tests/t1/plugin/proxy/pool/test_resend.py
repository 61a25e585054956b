"""A request whose replica is killed because its page server died: sent again if no part of an answer has reached the client, otherwise
aborted.
"""

from __future__ import annotations

import asyncio

import pytest

from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import Handler, Rig, Seen, Upstream, answer, echo_request, run, until, upstream

pytestmark = pytest.mark.t1
PATH = "/v1/completions"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"9\r\ndata: 1\n\n\r\n"


def dies(said: bytes) -> Handler:
    """Return a handler that sends this as its first answer and ends on request; later answers are complete."""

    async def handler(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if len(up.seen) > 1:
            return await echo_request(up, seen, reader, writer)
        writer.write(said)
        await writer.drain()
        await until(lambda: seen.gone)
        return False

    return handler


def lose(rig: Rig, up: Upstream) -> None:
    """Let the page server die: the owner marks the replica, and kills the engine."""
    replica = rig.pool.replicas["a"]
    replica.kill_reason = lambda: "why"
    up.seen[0].gone = True


async def back_again(rig: Rig) -> None:
    rig.trackers["a"].to(Phase.FAILED, "pages-lost")
    await asyncio.sleep(0.05)
    replica = rig.pool.replicas["a"]
    replica.pages_pending, replica.kill_reason = str, str
    rig.restore("a")


def add(rig: Rig, port: int, phase: Phase = Phase.SERVING) -> None:
    rig.add("a", port, phase=phase).pages_pending = lambda: True


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b'{"ok":', STREAM], ids=["nothing", "head", "part", "stream"])
def test_the_request_is_sent_again_completely(proxy, said):
    async def main():
        async with upstream(dies(said)) as up, proxy(speculative=True) as rig:
            add(rig, up.port)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"12345"))
            await until(lambda: len(up.seen) == 1)
            await asyncio.sleep(0.02)
            lose(rig, up)
            await back_again(rig)
            got = await waiting
            assert (got.status, got.json()["length"]) == (200, 5)
            assert [seen.body for seen in up.seen] == [b"12345"] * 2
            assert rig.server.buffered == 0 and rig.pool.replicas["a"].outstanding == 0

    run(main())


def test_a_request_whose_body_follows_later_is_sent_again(proxy):
    async def main():
        async with upstream(dies(b"")) as up, proxy(speculative=True) as rig:
            add(rig, up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(f"POST {PATH} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: 5\r\n\r\n1".encode())
            await asyncio.sleep(0.05)
            assert not up.seen
            writer.write(b"2345")
            await until(lambda: len(up.seen) == 1)
            await asyncio.sleep(0.02)
            lose(rig, up)
            await back_again(rig)
            assert b" 200 " in await reader.readline() and [seen.body for seen in up.seen] == [b"12345"] * 2
            writer.close()

    run(main())


def test_a_speculative_request_is_sent_again(proxy):
    async def main():
        async with upstream(dies(HEAD)) as up, proxy(speculative=True) as rig:
            add(rig, up.port, Phase.IDLE)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"12345"))
            await until(lambda: rig.pool.held == 1)
            for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING):
                rig.trackers["a"].to(phase)
            await until(lambda: len(up.seen) == 1)
            rig.trackers["a"].to(Phase.SERVING)
            await asyncio.sleep(0.05)
            lose(rig, up)
            await back_again(rig)
            got = await waiting
            assert (got.status, got.json()["length"], len(up.seen)) == (200, 5, 2)

    run(main())


def test_a_stream_that_has_begun_is_aborted(proxy):
    async def main():
        async with upstream(dies(STREAM + EVENT)) as up, proxy(speculative=True) as rig:
            add(rig, up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(f"POST {PATH} HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            await reader.readuntil(b"data: 1\n\n\r\n")  # it is not withheld
            lose(rig, up)
            assert b"0\r\n" not in await reader.read() and len(up.seen) == 1
            writer.close()

    run(main())


@pytest.mark.parametrize("why", ["not lost", "no pages are pending", "no generation"])
def test_other_failures_are_answered_as_usual(proxy, why):
    async def main():
        async with upstream(dies(b"")) as up, proxy(speculative=True) as rig:
            add(rig, up.port)
            if why == "no pages are pending":
                rig.pool.replicas["a"].pages_pending = lambda: False
            path = "/v1/files" if why == "no generation" else PATH
            waiting = asyncio.create_task(rig.get(path, method="POST", body=b"{}"))
            await until(lambda: len(up.seen) == 1)
            lose(rig, up)
            if why == "not lost":
                rig.pool.replicas["a"].kill_reason = str
            got = await waiting
            assert got.status == 502 and b"upstream-closed" in got.body and len(up.seen) == 1

    run(main())


def test_a_complete_answer_is_not_withheld(proxy):
    async def says(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(b"x" * (3 << 20)))
        return True

    async def main():
        async with upstream(says) as up, proxy(speculative=True) as rig:
            add(rig, up.port)
            got = await rig.get(PATH, method="POST", body=b"{}")
            assert got.status == 200 and got.body == b"x" * (3 << 20)

    run(main())
