"""Every upstream fault at every point of its answer: exactly one answer or an aborted one, and never a second try of a request that may
have run.
"""

from __future__ import annotations

import asyncio

import pytest

from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import (
    LIMIT_S,
    Seen,
    Upstream,
    answer,
    answering,
    echo_request,
    proxy,
    read_answer,
    reset,
    run,
    until,
    upstream,
)

pytestmark = pytest.mark.t1

WHOLE = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 20\r\n\r\n0123456789abcdefghij",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\na\r\nabcdefghij\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("framing", WHOLE)
@pytest.mark.parametrize("fault", ["reset", "close", "stall"])
def test_a_fault_after_every_byte_of_the_answer(framing, fault):
    """At each point: a complete and correct answer, a 502 or 504 with a code, or an aborted answer. The upstream saw the request once."""
    whole = WHOLE[framing]
    head_end = whole.index(b"\r\n\r\n") + 4

    async def broken(up: Upstream, seen: Seen, reader, writer) -> bool:
        point = int(seen.target[1:])
        writer.write(whole[:point])
        await writer.drain()
        if fault == "stall" and point < len(whole):
            await reader.read(1)  # until the proxy gives up
        elif fault == "reset":
            if point:
                await asyncio.sleep(0.002)  # a reset may overtake the bytes before it
            reset(writer)
        return False

    async def one(rig, up, point: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"POST /%d HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\nabc" % point)
        async with asyncio.timeout(LIMIT_S):
            try:
                got = await read_answer(reader)
            except asyncio.IncompleteReadError as exc:
                raise AssertionError(f"at {point}: no answer at all, {exc.partial!r}") from exc
            rest = b"" if got.whole and got.headers.get("connection") != "close" else await reader.read(100)
        writer.close()
        assert rest == b"", f"at {point}: something after the answer"
        if got.status == 200:
            assert point >= head_end or fault == "stall"
            assert got.whole == (point == len(whole)), f"at {point}: an aborted answer looked complete"
            assert b"0123456789abcdefghij".startswith(got.body)
            assert not got.whole or got.body == b"0123456789abcdefghij"
        else:
            assert point < head_end or fault == "reset", f"at {point}"
            assert got.status == (504 if fault == "stall" else 502)
            assert got.json()["error"]["code"] in ("upstream-cut", "upstream-closed", "upstream-timeout")

    async def main():
        async with upstream(broken) as up, proxy(Settings(upstream_timeout_s=0.25)) as rig:
            rig.add("a", up.port)
            points = range(len(whole) + 1)
            await asyncio.gather(*(one(rig, up, point) for point in points))
            assert sorted(seen.target for seen in up.seen) == sorted(f"/{point}" for point in points)
            await until(lambda: rig.pool.outstanding == 0)

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "close", "stall"])
def test_a_fault_after_every_byte_of_the_request(fault):
    """A replica ends after it has read a part of the request: one that may have run is never sent to the other replica."""
    touched: set[str] = set()
    injected = 0

    async def break_at(reader, writer) -> None:
        nonlocal injected
        point, injected = injected, injected + 1
        got = b""
        try:
            while len(got) < point:
                data = await reader.read(point - len(got))
                if not data:
                    return  # fewer bytes came: it was a complete request
                got += data
            if got:
                touched.add(got.split(b" ")[1].decode() if got.count(b" ") > 1 else "?")
            if fault == "stall":
                await reader.read(1 << 20)
                await reader.read(1)
            elif fault == "reset":
                reset(writer)
        finally:
            writer.close()

    async def main():
        server = await asyncio.start_server(break_at, "127.0.0.1", 0)
        settings = Settings(upstream_timeout_s=0.25)
        async with upstream() as live, proxy(settings) as rig:
            rig.add("broken", server.sockets[0].getsockname()[1])
            statuses = []
            for n in range(300):
                if n == 1:
                    rig.add("live", live.port)
                got = await rig.get(f"/{n}", method="POST", body=b"hello")
                statuses.append(got.status)
                assert got.status in (200, 502, 504) and got.whole
                if got.status != 200:
                    expected = ("upstream-closed", "upstream-timeout", "upstream-refused")
                    assert got.json()["error"]["code"] in expected
                if fault == "stall" and injected > 12:
                    break
            assert 502 in statuses or 504 in statuses
            sent_on = [seen.target for seen in live.seen]
            assert len(sent_on) == len(set(sent_on)) == statuses.count(200), "each answered request was seen"
            assert not touched & set(sent_on), "the other replica got a request that the first may have run"
            assert injected > 12
            await until(lambda: rig.pool.outstanding == 0)
        server.close()

    run(main())


def test_an_answer_sent_byte_by_byte_is_relayed_completely():
    """A slow replica is not silent: its limit counts from its last byte."""
    whole = WHOLE["chunked"]

    async def dribble(up: Upstream, seen: Seen, reader, writer) -> bool:
        for n in range(len(whole)):
            writer.write(whole[n : n + 1])
            await writer.drain()
            await asyncio.sleep(0.002)
        return True

    async def main():
        async with upstream(dribble) as up, proxy(Settings(upstream_timeout_s=0.15)) as rig:
            rig.add("a", up.port)
            got = await rig.get("/")
            assert got.status == 200 and got.whole and got.body == b"0123456789abcdefghij" and len(up.seen) == 1

    run(main())


@pytest.mark.slow
def test_a_slow_replica_pauses_the_client():
    async def deaf(up: Upstream, seen: Seen, reader, writer) -> bool:
        await listening.wait()
        left = int(seen.header("content-length")[0])
        while left:
            left -= len(await reader.read(1 << 16))
        writer.write(answer(b"all of it"))
        return True

    async def main():
        nonlocal listening
        listening = asyncio.Event()
        async with upstream(deaf, read_body=False) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            size, sent, last = 64 << 20, 0, -1
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % size)
            block = bytes(1 << 18)

            async def push() -> None:
                nonlocal sent
                while sent < size:
                    writer.write(block)
                    await writer.drain()
                    sent += len(block)

            pushing = asyncio.create_task(push())
            while last != sent:  # until it stops by itself
                last = sent
                await asyncio.sleep(0.1)
            assert sent < size // 2, "the client was read although the replica read nothing"
            (client,) = rig.server.clients
            assert client.exchange.connection.transport.get_write_buffer_size() < 1 << 20, "buffered in between"
            listening.set()
            await pushing
            assert (await read_answer(reader)).body == b"all of it"
            writer.close()

    listening = asyncio.Event()
    run(main())


def test_a_lack_of_descriptors_is_no_death_of_the_replica(monkeypatch):
    """The proxy's own lack of descriptors must not start a second engine beside a healthy one."""
    import errno

    from plugin.proxy import forwarding as module

    async def main():
        async with upstream() as up, proxy(wake=lambda: pytest.fail("woken")) as rig:
            rig.add("a", up.port)
            working = module.connect

            async def short(*_: object) -> object:
                raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(module, "connect", short)
            got = await rig.get("/")
            assert got.status == 503 and got.json()["error"]["code"] == "no-connection" and "retry-after" in got.headers
            monkeypatch.setattr(module, "connect", working)
            assert (await rig.get("/")).status == 200 and rig.pool.waker.wakes == 0

    run(main())


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000,
        b"\0" * 100,
    ],
)
def test_an_answer_that_is_not_http_is_a_502(garbage):
    async def main():
        async with upstream(answering(garbage)) as up, proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get("/")
            assert got.status == 502 and got.json()["error"]["code"] in ("upstream-garbage", "upstream-head")
            assert len(up.seen) == 1

    run(main())


def test_garbage_inside_a_chunked_answer_aborts_it():
    broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"

    async def main():
        async with upstream(answering(broken)) as up, proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get("/")
            assert got.status == 200 and not got.whole and got.body in (b"", b"abc")

    run(main())


def test_an_unrequested_answer_closes_its_connection():
    async def main():
        async with upstream(answering(answer(b"mine") + answer(b"stolen"))) as up, proxy() as rig:
            rig.add("a", up.port)
            for _ in range(10):
                assert (await rig.get("/")).body == b"mine"
            assert len(up.seen) == 10

    run(main())


def test_a_refused_connection_is_retried_once_on_another_replica():
    async def main():
        async with upstream() as dead:
            dead_port = dead.port
        async with upstream() as up, proxy() as rig:
            rig.add("dead", dead_port)
            rig.add("live", up.port)
            got = await asyncio.gather(*(rig.get(f"/{n}") for n in range(40)))
            assert {a.status for a in got} == {200}
            assert sorted(s.target for s in up.seen) == sorted(f"/{n}" for n in range(40))
            assert rig.server.stats.upstream_errors["upstream-refused"] >= 1

    run(main())


def test_a_replica_that_closes_before_anything_was_sent_is_skipped():
    async def slam(reader, writer):
        reset(writer)

    async def main():
        server = await asyncio.start_server(slam, "127.0.0.1", 0)
        async with upstream() as up, proxy() as rig:
            rig.add("slams", server.sockets[0].getsockname()[1])
            rig.add("live", up.port)
            got = await asyncio.gather(*(rig.get(f"/{n}") for n in range(20)))
            # a close after the head was written may mean that the request ran: then a 502, never a second
            # try
            assert {a.status for a in got} <= {200, 502}
            assert len(up.seen) == sum(a.status == 200 for a in got)
        server.close()

    run(main())


def test_a_dead_replica_is_woken_again():
    async def main():
        async with upstream() as dead:
            dead_port = dead.port
        async with upstream() as up:

            async def wake() -> None:
                tracker = rig.trackers["a"]
                rig.pool.replicas["a"].upstream = alive
                for phase in (
                    Phase.FAILED,
                    Phase.MOUNTING,
                    Phase.RESTORING,
                    Phase.WAKING,
                    Phase.VERIFYING,
                    Phase.SERVING,
                ):
                    tracker.to(phase)

            async with proxy(wake=wake) as rig:
                from plugin.proxy.http.address import tcp

                alive = tcp("127.0.0.1", up.port)
                rig.add("a", dead_port)
                got = await asyncio.gather(*(rig.get("/") for _ in range(10)))
                assert {a.status for a in got} == {200} and len(up.seen) == 10 and rig.pool.waker.wakes == 1

    run(main())


def test_a_replica_may_answer_before_the_body_is_complete():
    early = answering(answer(b"too large", "413 Content Too Large"), keep=False)

    async def main():
        async with upstream(early, read_body=False) as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5000000\r\n\r\n" + bytes(100_000))
            async with asyncio.timeout(LIMIT_S):
                got = await read_answer(reader)
                assert got.status in (413, 502)
                assert await reader.read(-1) == b"", "the connection ends, because its body is incomplete"
            writer.close()
            assert len(up.seen) == 1

    run(main())


@pytest.mark.slow
def test_slow_loris_is_dropped_in_head_and_in_body():
    async def main():
        settings = Settings(head_timeout_s=0.2, body_timeout_s=0.2)
        async with upstream() as up, proxy(settings) as rig:
            rig.add("a", up.port)
            for start in (
                b"GET / HTTP/1.1\r\nHost: t\r\nX-",
                b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\nab",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
                writer.write(start)
                async with asyncio.timeout(LIMIT_S):
                    raw = await reader.read(-1)
                assert raw.startswith(b"HTTP/1.1 408 "), raw
                writer.close()
            assert all(seen.gone or not seen.body for seen in up.seen)

    run(main())


def test_idle_clients_are_disconnected():
    async def main():
        async with upstream() as up, proxy(Settings(keepalive_s=0.1)) as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
            assert (await read_answer(reader)).status == 200
            async with asyncio.timeout(LIMIT_S):
                assert await reader.read(1) == b""
            writer.close()

    run(main())


def test_a_request_with_a_broken_body_ends():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            raw = await rig.raw(
                b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nQ\r\n", until_close=True
            )
            assert raw.startswith(b"HTTP/1.1 400 ")
            await until(lambda: rig.pool.outstanding == 0)
            assert (await rig.get("/")).status == 200

    run(main())


@pytest.mark.parametrize("handler", [echo_request])
def test_many_requests_with_clients_disconnecting_at_random(handler):
    async def main():
        async with upstream(handler) as up, proxy() as rig:
            rig.add("a", up.port)

            async def one(n: int) -> int:
                task = asyncio.create_task(rig.get(f"/stream/{n}" if n % 2 else f"/{n}"))
                if n % 3 == 0:
                    await asyncio.sleep(0.001 * (n % 40))
                    task.cancel()
                try:
                    return (await task).status
                except (asyncio.CancelledError, asyncio.IncompleteReadError):
                    return 0

            got = await asyncio.gather(*(one(n) for n in range(300)))
            assert all(status == 200 for n, status in enumerate(got) if n % 3)
            targets = [seen.target for seen in up.seen]
            assert len(targets) == len(set(targets)), "a request was seen twice"
            await until(lambda: rig.pool.outstanding == 0)

    run(main())


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("reset_it", [False, True])
def test_a_client_that_disconnects_after_any_byte_of_its_request(framing, reset_it):
    """The engine never takes a partial request for a complete one, and nothing is left behind."""
    if framing == "length":
        body = b"Content-Length: 5\r\n\r\nhello"
    else:
        body = b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"

    async def main():
        whole: list[str] = []

        async def note(up: Upstream, seen: Seen, reader, writer) -> bool:
            whole.append(seen.target)
            return await echo_request(up, seen, reader, writer)

        async with upstream(note) as up, proxy() as rig:
            rig.add("a", up.port)
            size = 0

            async def one(point: int) -> None:
                request = b"POST /%03d HTTP/1.1\r\nHost: t\r\n" % point + body
                nonlocal size
                size = len(request)
                _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
                writer.write(request[:point])
                await writer.drain()
                if reset_it:
                    reset(writer)
                else:
                    writer.close()

            await one(0)
            await asyncio.gather(*(one(point) for point in range(1, size)))
            await until(lambda: not rig.server.clients and rig.pool.outstanding == 0)
            assert whole == [], "an incomplete request was answered"
            assert rig.server.buffered == 0

    run(main())
