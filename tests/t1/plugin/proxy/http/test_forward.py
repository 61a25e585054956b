"""The proxy in front of a serving replica: what is forwarded, what is changed, and that nothing is buffered or lost. Tests that take
`proxy` run on both kinds, the others on the port only.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import resource

import pytest

from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from tests.kits.proxy.rig import LIMIT_S, Seen, Upstream, answer, answering, read_answer, until, upstream
from tests.kits.proxy.rig import proxy as port_proxy
from tests.kits.proxy.rig import run as run_on

pytestmark = pytest.mark.t1


@pytest.fixture(params=["uvloop", pytest.param("asyncio", marks=pytest.mark.slow)])
def run(request):
    """Run on both event loops, since the owner chooses."""
    return functools.partial(run_on, loop=request.param)


def test_hop_by_hop_fields_are_removed_and_forwarding_fields_set(run, proxy):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get(
                "/v1/x?q=%20",
                "Connection: keep-alive, X-Mine, Authorization",
                "X-Mine: 1",
                "Keep-Alive: timeout=5",
                "TE: trailers",
                "Proxy-Authorization: secret",
                "Authorization: Bearer b",
                "X-Forwarded-For: 6.6.6.6",
                "X-Request-Id: abc-1",
            )
            assert got.status == 200 and got.json()["target"] == "/v1/x?q=%20"
            assert got.headers["x-request-id"] == "abc-1"
            seen = up.seen[0]
            names = {name.lower() for name, _ in seen.headers}
            assert not names & {"connection", "x-mine", "keep-alive", "te", "proxy-authorization"}
            assert seen.header("authorization") == ["Bearer b"]
            assert seen.header("x-forwarded-for") == ["127.0.0.1"]
            assert seen.header("x-forwarded-host") == ["127.0.0.1"] and seen.header("x-forwarded-proto") == ["http"]
            assert seen.header("x-request-id") == ["abc-1"] and seen.header("host") == ["127.0.0.1"]

    run(main())


def test_a_trusted_proxy_in_front_keeps_its_forwarding_fields(run, proxy):
    async def main():
        async with upstream() as up, proxy(Settings(trust_forwarded=True)) as rig:
            rig.add("a", up.port)
            await rig.get("/", "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Forwarded-Host: shop")
            seen = up.seen[0]
            assert seen.header("x-forwarded-for") == ["6.6.6.6, 127.0.0.1"]
            assert seen.header("x-forwarded-proto") == ["https"] and seen.header("x-forwarded-host") == ["shop"]

    run(main())


@pytest.mark.parametrize("size", [0, 1, 65536, 3_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_forwarded_unchanged_in_both_directions(run, proxy, size, chunked):
    async def echo(up: Upstream, seen: Seen, reader, writer) -> bool:
        if chunked:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(seen.body), 100_000):
                part = seen.body[at : at + 100_000]
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            writer.write(b"0\r\nX-Sum: 7\r\n\r\n")
        else:
            writer.write(answer(seen.body))
        return True

    async def main():
        body = os.urandom(size)
        async with upstream(echo) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            if chunked:
                writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
                for at in range(0, size, 70_000):
                    part = body[at : at + 70_000]
                    writer.write(b"%x;ext=1\r\n%b\r\n" % (len(part), part))
                writer.write(b"0\r\nX-Checked: yes\r\nX-Forwarded-For: 127.0.0.1\r\nAuthorization: evil\r\n\r\n")
            else:
                writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (size, body))
            async with asyncio.timeout(LIMIT_S):
                got = await read_answer(reader)
            assert got.whole and got.body == body and up.seen[0].body == body
            if chunked:
                # uvicorn relays no trailers
                assert got.headers.get("trailer-x-sum") == ("7" if isinstance(rig.server, ProxyServer) else None)
                assert not [k for k, _ in up.seen[0].headers if k.startswith("trailer-")], (
                    "a request's trailers are dropped"
                )
            writer.close()

    run(main())


def test_connections_are_reused_on_both_sides(run):
    async def main():
        async with upstream() as up, port_proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            for n in range(20):
                writer.write(b"GET /%d HTTP/1.1\r\nHost: t\r\n\r\n" % n)
                assert (await read_answer(reader)).json()["target"] == f"/{n}"
            assert up.connections == 1
            writer.close()

    run(main())


def test_pipelined_requests_are_answered_in_order(run):
    async def main():
        async with upstream() as up, port_proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(
                b"".join(b"POST /%d HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nab" % n for n in range(10))
            )
            for n in range(10):
                assert (await read_answer(reader)).json() == {"ok": True, "target": f"/{n}", "length": 2}
            writer.close()

    run(main())


def test_events_are_forwarded_one_by_one_and_unchanged(run, proxy):
    gate = asyncio.Event()

    async def stepwise(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for n in range(20):
            event = b'data: {"n": %d, "t": "\xf0\x9f\x98\x80"}\n\n' % n
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await gate.wait()
            gate.clear()
        writer.write(b"0\r\n\r\n")
        return True

    async def main():
        async with upstream(stepwise) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"text/event-stream" in head
            for n in range(20):
                # the upstream sends the next event only after the client has read this one: buffering would hang
                async with asyncio.timeout(LIMIT_S):
                    size = int(await reader.readuntil(b"\r\n"), 16)
                    event = (await reader.readexactly(size + 2))[:-2]
                assert event == b'data: {"n": %d, "t": "\xf0\x9f\x98\x80"}\n\n' % n
                gate.set()
            assert await reader.readexactly(5) == b"0\r\n\r\n"
            writer.close()

    run(main())


def test_head_requests_304_and_http_1_0_clients(run):
    async def kinds(up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target == "/304":
            writer.write(b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n")
        elif seen.target == "/close":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
            return False
        elif seen.target == "/early":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + answer(b"x"))
        elif seen.method == "HEAD":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        return True

    async def main():
        async with upstream(kinds) as up, port_proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get("/", method="HEAD")
            assert got.headers["content-length"] == "12345"
            assert (await rig.get("/304")).status == 304
            assert (await rig.get("/close")).body == b"until the end"
            old = await rig.raw(b"GET / HTTP/1.0\r\n\r\n", until_close=True)
            assert old.startswith(b"HTTP/1.1 200") and old.endswith(b"\r\n\r\nabc") and b"chunked" not in old
            early = await rig.raw(b"GET /early HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", until_close=True)
            assert early.startswith(b"HTTP/1.1 103") and early.count(b"HTTP/1.1 200") == 1

    run(main())


def test_expect_continue_is_answered_by_the_proxy(run, proxy):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            async with asyncio.timeout(LIMIT_S):
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await read_answer(reader)).json()["length"] == 3
            assert not up.seen[0].header("expect")
            writer.close()

    run(main())


def test_another_upgrade_than_websocket_is_ignored_and_its_body_kept(run):
    async def main():
        async with upstream() as up, port_proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get("/x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", method="POST", body=b"abc")
            assert got.json()["length"] == 3 and not up.seen[0].header("upgrade")

    run(main())


def test_a_disconnect_reaches_the_replica_within_the_limit(run, proxy):
    async def endless(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"5\r\nhello\r\n")
        await writer.drain()
        await reader.read(1)
        seen.gone = True
        return False

    async def main():
        async with upstream(endless) as up, proxy() as rig:
            replica = rig.add("a", up.port)
            for _ in range(10):
                reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
                writer.write(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
                await reader.readuntil(b"hello")
                writer.transport.abort()
                await until(lambda: up.seen[-1].gone, "the replica to see its client go")
            await until(lambda: rig.server.stats.outcomes["client-gone"] == 10)
            # It counts as served: clients often disconnect at the last token, before the end of the stream.
            assert rig.pool.outstanding == 0 and replica.served == 10

    run(main())


def test_a_client_that_disconnects_before_the_first_token_was_not_served(run, proxy):
    async def silent(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()
        await reader.read(1)
        return False

    async def main():
        async with upstream(silent) as up, proxy() as rig:
            replica = rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
            await until(lambda: rig.server.stats.outcomes["client-gone"] == 1)
            assert replica.served == 0

    run(main())


@pytest.mark.slow
def test_a_slow_client_pauses_the_replica(run, proxy):
    sent = 0

    async def flood(up: Upstream, seen: Seen, reader, writer) -> bool:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (256 << 20))
        block = bytes(1 << 20)
        for _ in range(256):
            writer.write(block)
            await writer.drain()
            sent += 1
        return True

    async def main():
        async with upstream(flood) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1 << 16)
            writer.write(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            last = -1
            while last != sent:  # until it has stopped by itself
                last = sent
                await asyncio.sleep(0.3)
            assert sent < 64, "the replica kept sending although the client did not read"
            total = 0
            async with asyncio.timeout(LIMIT_S):
                while total < 256 << 20:
                    total += len(await reader.read(1 << 20))
            writer.close()

    run(main())


@pytest.mark.slow
def test_a_gibibyte_is_forwarded_in_constant_memory(run, proxy):
    size = 1 << 30
    digest = hashlib.blake2b()

    async def sink(up: Upstream, seen: Seen, reader, writer) -> bool:
        left = size
        while left:
            data = await reader.read(min(left, 1 << 20))
            digest.update(data)
            left -= len(data)
        writer.write(answer(b"done"))
        return True

    async def main():
        sent = hashlib.blake2b()
        async with upstream(sink, read_body=False) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % size)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            block = os.urandom(1 << 20)
            for _ in range(size >> 20):
                writer.write(block)
                sent.update(block)
                await writer.drain()
            assert (await read_answer(reader)).body == b"done"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            assert grown < 64, f"{grown:.0f} MiB were buffered"
            assert sent.digest() == digest.digest()
            writer.close()

    run(main())


def test_websocket_bytes_are_forwarded_and_both_ends_close(run):
    async def socket_end(up: Upstream, seen: Seen, reader, writer) -> bool:
        assert seen.header("upgrade") == ["websocket"] and seen.header("connection") == ["upgrade"]
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-X: 1\r\n\r\nfirst"
        )
        while data := await reader.read(1000):
            writer.write(data[::-1])
            await writer.drain()
        seen.gone = True
        return False

    async def main():
        async with upstream(socket_end) as up, port_proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(
                b"GET /v1/realtime HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nabc"
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101") and b"Sec-X: 1" in head
            assert await reader.readexactly(8) == b"firstcba"
            writer.write(b"12345")
            assert await reader.readexactly(5) == b"54321"
            writer.close()
            await until(lambda: up.seen[0].gone)
            await until(lambda: rig.server.stats.outcomes["tunnel"] == 1)

    run(main())


def test_a_refused_websocket_gets_the_replicas_own_answer(run):
    async def main():
        async with upstream(answering(answer(b"no", "403 Forbidden"))) as up, port_proxy() as rig:
            rig.add("a", up.port)
            raw = await rig.raw(
                b"GET /ws HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", until_close=True
            )
            assert raw.startswith(b"HTTP/1.1 403") and raw.endswith(b"no")

    run(main())
