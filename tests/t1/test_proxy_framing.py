"""Any split of bytes, any order of events: the client gets the bytes that the upstream sent, and the upstream those
that the client sent.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy_rig import LIMIT_S, Seen, Upstream, proxy, read_answer, run, upstream

from plugin.phases import Phase

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
    """(bytes on the wire after the first line, the body they mean), framed by length, by chunks or, for answers, by
    the end.
    """
    body = draw(pieces)
    if draw(st.booleans()):
        joined = b"".join(body)
        return b"Content-Length: %d\r\n\r\n%b" % (len(joined), joined), joined
    wire = b"Transfer-Encoding: chunked\r\n\r\n"
    for piece in body:
        wire += b"%x%b\r\n%b\r\n" % (len(piece), draw(extensions), piece)
    return wire + b"0\r\n" + draw(st.sampled_from([b"", b"X-T: 1\r\n"])) + b"\r\n", b"".join(body)


@SLOW
@given(
    exchanges=st.lists(st.tuples(messages(), messages(), cuts, cuts), min_size=1, max_size=4),
    held=st.booleans(),
    pipelined=st.booleans(),
)
def test_bytes_are_kept_however_they_are_cut(exchanges, held, pipelined):
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


@SLOW
@given(junk=st.binary(min_size=1, max_size=400), where=cuts, good=st.booleans())
def test_junk_from_a_client_never_hangs_and_never_reaches_the_engine_as_two(junk, where, good):
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
def test_junk_from_a_replica_ends_in_one_answer_or_a_cut(junk, where, after):
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
                    assert after, "an answer is due when nothing has been sent on"
            writer.close()
            assert len(up.seen) == 1

    run(main())
