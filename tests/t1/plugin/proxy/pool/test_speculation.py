"""A speculative request beside the check of a restored replica: its answer is withheld until the check passes, and dropped if it fails."""

from __future__ import annotations

import asyncio

import pytest

from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import LIMIT_S, Rig, Seen, Upstream, answer, echo_request, read_answer, run, until, upstream

pytestmark = pytest.mark.t1
PATH = "/v1/completions"


def checking(rig: Rig, name: str = "a") -> None:
    for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING):
        rig.trackers[name].to(phase)


async def raw_client(
    rig: Rig, path: str = PATH, body: bytes = b"{}"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


def test_nothing_reaches_the_client_before_the_check_passes(proxy):
    async def main():
        async with upstream() as up, proxy(speculative=True) as rig:
            replica = rig.add("a", up.port, phase=Phase.IDLE)
            reader, writer = await raw_client(rig)
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await until(lambda: len(up.seen) == 1)
            early = asyncio.create_task(reader.read(1))
            done, _ = await asyncio.wait({early}, timeout=0.1)
            assert not done and replica.served == 0
            rig.trackers["a"].to(Phase.SERVING)
            assert (await early) + await reader.readuntil(b"}") != b""
            await until(lambda: replica.served == 1)
            assert len(up.seen) == 1 and replica.outstanding == 0
            writer.close()

    run(main())


def test_a_replica_checked_before_the_proxy_started_takes_a_speculative_request(proxy):
    async def main():
        async with upstream() as up, proxy(speculative=True) as rig:
            rig.add("a", up.port, phase=Phase.VERIFYING)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"{}"))
            await until(lambda: len(up.seen) == 1)
            rig.trackers["a"].to(Phase.SERVING)
            assert (await waiting).status == 200 and len(up.seen) == 1

    run(main())


def test_one_request_is_speculative_and_the_others_wait(proxy):
    async def main():
        async with upstream() as up, proxy(speculative=True) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            waiting = [asyncio.create_task(rig.get(PATH, method="POST", body=b"%d" % n)) for n in range(5)]
            await until(lambda: rig.pool.held == 5)
            checking(rig)
            await until(lambda: len(up.seen) == 1)
            await asyncio.sleep(0.05)
            assert len(up.seen) == 1 and rig.pool.held == 4
            rig.trackers["a"].to(Phase.SERVING)
            got = await asyncio.gather(*waiting)
            assert {a.status for a in got} == {200} and len(up.seen) == 5

    run(main())


@pytest.mark.parametrize("target", ["/v1/load_lora_adapter", "/v1/files", "/"])
def test_only_generations_are_speculative(proxy, target):
    async def main():
        async with upstream() as up, proxy(speculative=True) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get(target, method="POST", body=b"{}"))
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await asyncio.sleep(0.05)
            assert not up.seen and rig.pool.held == 1
            rig.trackers["a"].to(Phase.SERVING)
            assert (await waiting).status == 200

    run(main())


def test_without_the_owners_consent_no_request_is_speculative(proxy):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"{}"))
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await asyncio.sleep(0.05)
            assert not up.seen
            rig.trackers["a"].to(Phase.SERVING)
            assert (await waiting).status == 200

    run(main())


def test_after_a_failed_check_another_replica_answers(proxy):
    async def wrong(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(b'{"wrong":true}', "200 OK", "X-Wrong: yes"))
        return True

    async def main():
        async with upstream(wrong) as bad, upstream() as good, proxy(speculative=True) as rig:
            replica = rig.add("a", bad.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"x" * 70_000))
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await until(lambda: len(bad.seen) == 1)
            await asyncio.sleep(0.05)
            rig.trackers["a"].to(Phase.FAILED, "canary-differs")
            await until(lambda: rig.pool.held == 1 and replica.outstanding == 0)
            rig.add("b", good.port)
            got = await waiting
            assert got.json() == {"ok": True, "target": PATH, "length": 70_000}
            assert "x-wrong" not in got.headers and len(bad.seen) == len(good.seen) == 1
            assert rig.server.buffered == 0

    run(main())


@pytest.mark.parametrize("passes", [True, False])
def test_a_connection_broken_during_the_check_gives_one_answer(proxy, passes):
    async def breaks(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if len(up.seen) > 1:
            return await echo_request(up, seen, reader, writer)
        return False

    async def main():
        async with upstream(breaks) as up, proxy(speculative=True) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"{}"))
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await until(lambda: len(up.seen) == 1)
            await asyncio.sleep(0.05)
            if not passes:
                rig.trackers["a"].to(Phase.FAILED, "the replica is gone")
                rig.restore("a")
            else:
                rig.trackers["a"].to(Phase.SERVING)
            got = await waiting
            # One answer in both cases: the replica's fault if it serves on, otherwise the answer of another try.
            assert (got.status, len(up.seen)) == ((502, 1) if passes else (200, 2))

    run(main())


def test_a_cancelled_speculative_request_is_sent_again(proxy):
    async def slow(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if len(up.seen) == 1:
            await asyncio.wait_for(reader.read(1), LIMIT_S)  # until it is aborted
            seen.gone = True
            return False
        return await echo_request(up, seen, reader, writer)

    async def main():
        async with upstream(slow) as up, proxy(speculative=True) as rig:
            replica = rig.add("a", up.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get(PATH, method="POST", body=b"12345"))
            await until(lambda: rig.pool.held == 1)
            assert not await rig.pool.cancel_speculation("a")
            checking(rig)
            await until(lambda: len(up.seen) == 1)
            assert await rig.pool.cancel_speculation("a") and replica.outstanding == 0
            await until(lambda: up.seen[0].gone and rig.pool.held == 1)
            assert not await rig.pool.cancel_speculation("a") and len(up.seen) == 1
            rig.trackers["a"].to(Phase.SERVING)
            assert (await waiting).json()["length"] == 5 and len(up.seen) == 2

    run(main())


async def never(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer nothing until the proxy gives up."""
    await asyncio.wait_for(reader.read(1), LIMIT_S)
    seen.gone = True
    return False


def test_a_client_that_leaves_frees_the_replica(proxy):
    async def main():
        async with upstream(never) as up, proxy(speculative=True) as rig:
            replica = rig.add("a", up.port, phase=Phase.IDLE)
            _, writer = await raw_client(rig)
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await until(lambda: len(up.seen) == 1)
            writer.transport.abort()
            await until(lambda: up.seen[0].gone and replica.outstanding == 0)
            assert replica.check is not None and not replica.check.done()

    run(main())


def test_a_held_requests_deadline_applies_during_the_check(proxy):
    async def main():
        async with upstream(never) as up, proxy(speculative=True) as rig:
            replica = rig.add("a", up.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get(PATH, "X-Quickthaw-Hold: 0.3", method="POST", body=b"{}"))
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            got = await waiting
            assert got.status == 503 and b"hold-deadline" in got.body
            await until(lambda: up.seen[0].gone and replica.outstanding == 0)

    run(main())


@pytest.mark.slow
def test_a_long_withheld_stream_is_bounded_and_complete(proxy):
    size, parts = 1 << 16, 200

    async def stream(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for n in range(parts):
            writer.write(b"%x\r\n%b\r\n" % (size, bytes([n]) * size))
            await writer.drain()
            up.sent = n
        writer.write(b"0\r\n\r\n")
        return True

    async def main():
        async with upstream(stream) as up, proxy(speculative=True) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            reader, writer = await raw_client(rig)
            await until(lambda: rig.pool.held == 1)
            checking(rig)
            await until(lambda: len(up.seen) == 1)
            await asyncio.sleep(0.2)
            kept = sum(
                len(piece) for client in rig.server.clients for piece in client.exchange.out if isinstance(piece, bytes)
            )
            assert 1 << 20 < kept < 2 << 20 and up.sent < parts - 1
            rig.trackers["a"].to(Phase.SERVING)
            got = await read_answer(reader)
            assert got.whole and got.body == b"".join(bytes([n]) * size for n in range(parts))
            writer.close()

    run(main())
