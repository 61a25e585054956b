"""Any split of bytes and any order of events: client and upstream receive exactly the bytes that the other sent."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import LIMIT_S, Seen, Upstream, proxy, read_answer, run, upstream

pytestmark = pytest.mark.t1

SLOW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


pieces = st.lists(st.binary(min_size=1, max_size=300), max_size=8)
cuts = st.lists(st.integers(0, 10_000), max_size=12)
extensions = st.sampled_from([b"", b";a", b";name=value", b';q="x y"'])


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Return (bytes on the wire after the first line, their body), framed by length, by chunks or, for answers, by the end."""
    body = draw(pieces)
    if draw(st.booleans()):
        joined = b"".join(body)
        return b"Content-Length: %d\r\n\r\n%b" % (len(joined), joined), joined
    wire = b"Transfer-Encoding: chunked\r\n\r\n"
    for piece in body:
        wire += b"%x%b\r\n%b\r\n" % (len(piece), draw(extensions), piece)
    return wire + b"0\r\n" + draw(st.sampled_from([b"", b"X-T: 1\r\n"])) + b"\r\n", b"".join(body)


@pytest.mark.slow
@SLOW
@given(
    exchanges=st.lists(st.tuples(messages(), messages(), cuts, cuts), min_size=1, max_size=4),
    held=st.booleans(),
    pipelined=st.booleans(),
)
def test_bytes_are_kept_for_any_split(exchanges, held, pipelined):
    async def scripted(up: Upstream, seen: Seen, reader, writer) -> bool:
        _, (wire, _), _, where = exchanges[int(seen.target[1:])]
        for part in split(b"HTTP/1.1 200 OK\r\n" + wire, where):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        return True

    async def main():
        async with upstream(scripted) as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE if held else Phase.SERVING)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            if held:
                asyncio.get_running_loop().call_later(0.01, rig.restore, "a")
            for n, ((wire, _), (_, expected), where, _) in enumerate(exchanges):
                for part in split(b"POST /%d HTTP/1.1\r\nHost: t\r\n" % n + wire, where):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                if not pipelined:
                    async with asyncio.timeout(LIMIT_S):
                        got = await read_answer(reader)
                    assert got.status == 200 and got.whole and got.body == expected
            if pipelined:
                for _, (_, expected), _, _ in exchanges:
                    async with asyncio.timeout(LIMIT_S):
                        got = await read_answer(reader)
                    assert got.status == 200 and got.whole and got.body == expected
            assert [seen.body for seen in up.seen] == [body for (_, body), _, _, _ in exchanges]
            writer.close()

    run(main())


@pytest.mark.slow
@SLOW
@given(
    up_pieces=pieces,
    down_pieces=pieces,
    order=st.lists(st.sampled_from(["client", "replica", "turn", "while"]), max_size=24),
    chunked=st.booleans(),
    until_close=st.booleans(),
)
def test_any_order_of_events_in_both_directions(up_pieces, down_pieces, order, chunked, until_close):
    """The replica answers while the request is still being sent: each receives what the other sent."""
    down = b"".join(down_pieces)
    chunked = chunked or not down
    last = down_pieces[-1] if down_pieces else b""  # kept until the end: a complete answer ends its request

    async def main():
        turns: asyncio.Queue[bytes | None] = asyncio.Queue()
        got_up = bytearray()

        async def both_ways(up: Upstream, seen: Seen, reader, writer) -> bool:
            def framed(piece: bytes) -> bytes:
                return b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and not until_close and piece else piece

            listening = asyncio.create_task(up.body(seen, reader))
            length = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(down)
            writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n" % (b"" if until_close else length))
            while (piece := await turns.get()) is not None:
                writer.write(framed(piece))
                await writer.drain()
            got_up.extend(await listening)
            writer.write(framed(last) + (b"0\r\n\r\n" if chunked and not until_close else b""))
            return not until_close

        async with upstream(both_ways, read_body=False) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            to_send, to_answer = list(up_pieces), list(down_pieces[:-1])
            for step in [*order, *["client"] * len(to_send), *["replica"] * len(to_answer)]:
                if step == "client" and to_send:
                    piece = to_send.pop(0)
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                elif step == "replica" and to_answer:
                    turns.put_nowait(to_answer.pop(0))
                elif step == "turn":
                    await asyncio.sleep(0)
                elif step == "while":
                    await asyncio.sleep(0.001)
            writer.write(b"0\r\n\r\n")
            turns.put_nowait(None)
            async with asyncio.timeout(LIMIT_S):
                got = await read_answer(reader)
            writer.close()
            assert got.status == 200 and got.whole and got.body == down
            assert bytes(got_up) == b"".join(up_pieces)

    run(main())


@pytest.mark.slow
@SLOW
@given(junk=st.binary(min_size=1, max_size=400), where=cuts, good=st.booleans())
def test_client_junk_never_hangs_and_never_becomes_two_requests(junk, where, good):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            start = b"GET /good HTTP/1.1\r\nHost: t\r\n\r\n" if good else b""
            for part in split(start + junk, where):
                writer.write(part)
                await asyncio.sleep(0)
            writer.write_eof()
            async with asyncio.timeout(LIMIT_S):
                try:
                    await reader.read(-1)
                except ConnectionError:
                    pass
            writer.close()
            assert len(up.seen) <= 1
            assert (await rig.get("/after")).status == 200

    run(main())


@SLOW
@given(
    junk=st.binary(min_size=1, max_size=400),
    where=cuts,
    after=st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\n"]),
)
def test_replica_junk_ends_in_one_answer_or_an_aborted_one(junk, where, after):
    async def babble(up: Upstream, seen: Seen, reader, writer) -> bool:
        for part in split(after + junk, where):
            writer.write(part)
            await asyncio.sleep(0)
        return False

    async def main():
        async with upstream(babble) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
            async with asyncio.timeout(LIMIT_S):
                try:
                    got = await read_answer(reader)
                    assert got.status == 502 or after
                except (asyncio.IncompleteReadError, ConnectionError):
                    assert after, "an answer is due if nothing was forwarded"
            writer.close()
            assert len(up.seen) == 1

    run(main())
