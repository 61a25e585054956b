"""Requests that arrive while no replica serves: held, released once, refused by code if they cannot be held; wake, sleep, shutdown."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest

from plugin.proxy.errors import StartFailed
from plugin.proxy.http.downstream import ClientConnection
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import LIMIT_S, Seen, Upstream, answer, echo_request, read_answer, run, until, upstream

pytestmark = pytest.mark.t1


def test_requests_are_held_until_a_replica_serves_and_sent_once(proxy):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            waiting = [asyncio.create_task(rig.get(f"/{n}")) for n in range(100)]
            await until(lambda: rig.pool.held == 100)
            assert (await rig.get("/-/ready?strict=1")).status == 503
            # an owner's thread moves the phases
            thread = threading.Thread(target=rig.restore, args=("a",))
            thread.start()
            got = await asyncio.gather(*waiting)
            thread.join()
            assert [a.json()["target"] for a in got] == [f"/{n}" for n in range(100)]
            assert sorted(s.target for s in up.seen) == sorted(f"/{n}" for n in range(100))
            assert (await rig.get("/-/ready?strict=1")).status == 200

    run(main())


def test_all_waiting_requests_share_one_wake(proxy):
    wakes = 0

    async def main():
        async with upstream() as up:

            async def wake() -> None:
                nonlocal wakes
                wakes += 1
                await until(lambda: rig.pool.held == 50)
                rig.restore("a")

            async with proxy(wake=wake) as rig:
                rig.add("a", up.port, phase=Phase.IDLE)
                got = await asyncio.gather(*(rig.get("/") for _ in range(50)))
                assert {a.status for a in got} == {200} and wakes == 1 and rig.pool.waker.wakes == 1

    run(main())


def test_held_requests_survive_a_failed_restore_before_a_cold_start(proxy):
    async def main():
        async with upstream() as up:

            async def wake() -> None:
                tracker = rig.trackers["a"]
                tracker.to(Phase.MOUNTING)
                tracker.to(Phase.RESTORING)
                tracker.to(Phase.FAILED, "criu-restore")
                await asyncio.sleep(0.05)
                for phase in (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING, Phase.SERVING):
                    tracker.to(phase)

            async with proxy(wake=wake) as rig:
                rig.add("a", up.port, phase=Phase.IDLE)
                got = await asyncio.gather(*(rig.get("/") for _ in range(20)))
                assert {a.status for a in got} == {200} and len(up.seen) == 20
                assert rig.pool.history.seen("cold") and not rig.pool.history.seen("restored")

    run(main())


def test_a_final_start_failure_ends_held_requests_with_its_code(proxy):
    class Broken(Exception):
        code = "engine-died"

    async def main():
        async def wake() -> None:
            await until(lambda: rig.pool.held == 10)
            raise Broken("the engine ended with code 3")

        async with proxy(wake=wake) as rig:
            got = await asyncio.gather(*(rig.get("/v1/chat/completions") for _ in range(10)))
            for a in got:
                assert a.status == 503 and int(a.headers["retry-after"]) >= 1
                assert a.json()["error"] == {
                    "message": "the engine ended with code 3",
                    "type": "server_error",
                    "param": None,
                    "code": "engine-died",
                }
            # the next request does not retry a start that has just failed
            again = await rig.get("/v1/messages")
            assert again.status == 503 and again.json()["error"]["code"] == "engine-died" and rig.pool.waker.wakes == 1
            assert again.json()["type"] == "error" and again.json()["error"]["type"] == "overloaded_error"

    run(main())


def test_an_owner_without_a_wake_reports_the_final_failure(proxy):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            rig.trackers["a"].to(Phase.MOUNTING)
            waiting = asyncio.create_task(rig.get("/"))
            await until(lambda: rig.pool.held == 1)
            rig.trackers["a"].to(Phase.FAILED, "x")
            await asyncio.sleep(0.05)
            assert rig.pool.held == 1, "a failed phase alone ends no request"
            rig.pool.start_failed(StartFailed("no-gpu", "no GPU"))
            assert (await waiting).json()["error"]["code"] == "no-gpu"
            assert (await rig.get("/")).json()["error"]["code"] == "no-gpu"
            rig.trackers["a"].to(Phase.MOUNTING)
            waiting = asyncio.create_task(rig.get("/"))
            await until(lambda: rig.pool.held == 1)
            for phase in (Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                rig.trackers["a"].to(phase)
            assert (await waiting).status == 200

    run(main())


@pytest.mark.slow
def test_the_deadline_is_the_settings_or_the_clients(proxy):
    async def main():
        async with proxy(Settings(hold_timeout_s=0.3)) as rig:
            got = await rig.get("/")
            assert got.status == 503 and got.json()["error"]["code"] == "hold-deadline"
            assert int(got.headers["retry-after"]) >= 1
        async with proxy(Settings(hold_timeout_s=500)) as rig:
            for header in ("X-Quickthaw-Hold: 0.2", "Prefer: wait=0.2", "X-Quickthaw-Hold: 0"):
                assert (await rig.get("/", header)).json()["error"]["code"] == "hold-deadline"
            assert (await rig.get("/", "X-Quickthaw-Hold: soon")).status == 400
        async with proxy(Settings(max_hold_s=500)) as rig:
            rig.pool.history.deadline = lambda kind: 0.2
            got = await rig.get("/", "X-Quickthaw-Hold: 400")
            assert got.json()["error"]["code"] == "hold-deadline", "a client lowers it, and does not raise it"

    run(main())


def test_held_requests_are_limited_in_number_and_bytes(proxy):
    async def main():
        async with proxy(Settings(max_held=3)) as rig:
            waiting = [asyncio.create_task(rig.get("/")) for _ in range(3)]
            await until(lambda: rig.pool.held == 3)
            got = await rig.get("/")
            assert got.status == 503 and got.json()["error"]["code"] == "held-too-many" and "retry-after" in got.headers
            for task in waiting:
                task.cancel()
            await until(lambda: rig.pool.held == 0)
        async with proxy(Settings(max_held_bytes=100_000)) as rig:
            body = bytes(60_000)
            waiting = [asyncio.create_task(rig.get("/", method="POST", body=body)) for _ in range(4)]
            async with asyncio.timeout(LIMIT_S):
                done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert {task.result().json()["error"]["code"] for task in done} == {"held-bytes"}
            for task in left:
                task.cancel()
            await until(lambda: rig.server.buffered == 0)

    run(main())


@pytest.mark.parametrize("sent", [0, 100_000])
def test_a_held_request_of_a_disconnected_client_is_never_sent(proxy, sent):
    """Even if more of its body has arrived than is kept, so that it is paused and its end is unread."""

    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            writers = []
            for _ in range(5):
                _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
                writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (2 * sent) + bytes(sent))
                await writer.drain()
                writers.append(writer)
            await until(lambda: rig.pool.held == 5)
            for writer in writers:
                writer.transport.abort()
            await until(lambda: rig.pool.held == 0)
            rig.restore("a")
            assert (await rig.get("/after")).status == 200
            assert [seen.target for seen in up.seen] == ["/after"]
            assert rig.server.stats.outcomes["client-gone"] == 5 and rig.server.buffered == 0

    run(main())


@pytest.mark.slow
def test_nothing_is_sent_before_the_replicas_head_by_default(proxy):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"GET /stream HTTP/1.1\r\nHost: t\r\n\r\n")
            await until(lambda: rig.pool.held == 1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await reader.read(1)
            rig.restore("a")
            got = await read_answer(reader)
            assert got.body == b"".join(b"data: %d\n\n" % n for n in range(5))
            writer.close()

    run(main())


def streaming_body(**more):
    return json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def test_an_early_stream_reports_progress_and_then_the_events(proxy):
    async def main():
        settings = Settings(early_stream=True, early_comment_every_s=0.05)
        async with upstream() as up, proxy(settings) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            rig.trackers["a"].to(Phase.MOUNTING)
            rig.trackers["a"].to(Phase.RESTORING)
            body = streaming_body()
            task = asyncio.create_task(rig.get("/stream", "Accept-Encoding: gzip", method="POST", body=body))
            plain = asyncio.create_task(
                rig.get("/plain", method="POST", body=b'{"stream": false, "x": "\\"stream\\": true"}')
            )
            await until(lambda: rig.pool.held == 2)
            await asyncio.sleep(0.2)
            for phase in (Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                rig.trackers["a"].to(phase)
            got = await task
            assert got.status == 200 and got.headers["content-type"].startswith("text/event-stream") and got.whole
            comments = [c for c in got.chunks if c.startswith(b": waking, restoring ")]
            assert len(comments) >= 2 and all(c.endswith(b" s\n\n") for c in comments)
            events = b"".join(c for c in got.chunks if not c.startswith(b":"))
            assert events == b"".join(b"data: %d\n\n" % n for n in range(5))
            assert not next(s for s in up.seen if s.target == "/stream").header("accept-encoding")
            assert (await plain).json()["target"] == "/plain"

    run(main())


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/v1/chat/completions", b'data: {"error":'), ("/v1/messages", b'event: error\ndata: {"type":"error"')],
)
@pytest.mark.parametrize("how", ["start fails", "replica refuses", "replica cuts"])
def test_an_early_stream_can_end_with_an_error_event(proxy, path, expected, how):
    async def refuse(up: Upstream, seen: Seen, reader, writer) -> bool:
        if how == "replica cuts":
            return False
        writer.write(answer(b'{"detail": "too long"}', "400 Bad Request"))
        return True

    async def main():
        async with upstream(refuse) as up, proxy(Settings(early_stream=True)) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            task = asyncio.create_task(rig.get(path, method="POST", body=streaming_body()))
            await until(lambda: rig.pool.held == 1)
            if how == "start fails":
                rig.pool.start_failed(StartFailed("no-gpu", "no GPU"))
            else:
                rig.restore("a")
            got = await task
            assert got.status == 200 and got.whole
            assert got.chunks[-1].startswith(expected) and got.chunks[-1].endswith(b"\n\n")
            code = {"start fails": b"no-gpu", "replica refuses": b"too long", "replica cuts": b"upstream-closed"}[how]
            assert code in got.chunks[-1]

    run(main())


def test_an_idle_engine_sleeps_and_wakes_without_losing_a_request(proxy):
    async def main():
        async with upstream() as up:

            async def wake() -> None:
                rig.trackers["a"].to(Phase.WAKING)
                await asyncio.sleep(0.01)
                rig.trackers["a"].to(Phase.VERIFYING)
                rig.trackers["a"].to(Phase.SERVING)

            async def sleep() -> None:
                assert rig.pool.outstanding == 0
                await asyncio.sleep(0.01)
                rig.trackers["a"].to(Phase.ASLEEP)

            async with proxy(wake=wake, sleep=sleep, sleep_after_s=0.02) as rig:
                rig.add("a", up.port)
                done = 0

                async def client(n: int) -> None:
                    nonlocal done
                    for turn in range(15):
                        assert (await rig.get(f"/{n}/{turn}")).status == 200
                        done += 1
                        await asyncio.sleep(0.013 * ((n + turn) % 5))  # around the time of the sleep

                await asyncio.gather(*(client(n) for n in range(3)))
                await until(lambda: rig.pool.sleeper.sleeps >= 1)
                assert done == 45 and len(up.seen) == 45
                assert {s.target for s in up.seen} == {f"/{n}/{t}" for n in range(3) for t in range(15)}

    run(main())


def test_a_replica_that_does_not_sleep_keeps_serving(proxy):
    async def main():
        async with upstream() as up:

            async def sleep() -> None:
                raise StartFailed("busy", "no")

            async with proxy(sleep=sleep) as rig:
                rig.add("a", up.port)
                assert not await rig.pool.sleep() and rig.pool.sleeper.sleeps == 0
                assert (await rig.get("/")).status == 200

    run(main())


def test_quiesced_holds_new_requests_and_waits_for_those_in_flight(proxy):
    gate = asyncio.Event()

    async def gated(up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target == "/slow":
            await gate.wait()
        return await echo_request(up, seen, reader, writer)

    async def main():
        async with upstream(gated) as up, proxy() as rig:
            rig.add("a", up.port)
            slow = asyncio.create_task(rig.get("/slow"))
            await until(lambda: len(up.seen) == 1)
            with pytest.raises(TimeoutError):
                async with rig.pool.quiesced("a", 0.1):
                    raise AssertionError("it was not quiet")
            entered = asyncio.Event()

            async def snapshot() -> None:
                async with rig.pool.quiesced("a", LIMIT_S):
                    entered.set()
                    assert rig.pool.outstanding == 0
                    await until(lambda: rig.pool.held == 1)
                    assert len(up.seen) == 1

            task = asyncio.create_task(snapshot())
            await asyncio.sleep(0.05)
            held = asyncio.create_task(rig.get("/held"))
            await until(lambda: rig.pool.held == 1)
            assert not entered.is_set()
            gate.set()
            await task
            assert (await slow).status == (await held).status == 200

    run(main())


def test_a_proxy_that_another_process_replaces_refuses_nothing_that_it_accepted(proxy, request):
    if "asgi" in request.node.callspec.id:
        pytest.skip("its server accepts the connections")

    async def main():
        async with upstream() as up, proxy() as rig, proxy() as other, proxy() as last:
            rig.add("a", up.port)
            last.add("a", up.port)
            fresh_reader, fresh = await asyncio.open_connection("127.0.0.1", rig.port)
            idle_reader, idle = await asyncio.open_connection("127.0.0.1", rig.port)
            idle.write(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\n")
            await idle_reader.readuntil(b"\r\n\r\n")
            held = asyncio.create_task(other.get("/held"))
            await until(lambda: rig.connections() == 2 and other.pool.held == 1)
            rig.server.replaced = other.server.replaced = last.server.replaced = True
            stopping = asyncio.gather(rig.stop(LIMIT_S), other.stop(LIMIT_S), last.stop(LIMIT_S))
            await asyncio.sleep(0)
            accepted = socket.socketpair()
            await last.server.loop.connect_accepted_socket(lambda: ClientConnection(last.server), accepted[0])
            accepted[1].sendall(b"GET /accepted HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.to_thread(accepted[1].recv, 1 << 16)).startswith(b"HTTP/1.1 200 ")
            accepted[1].close()
            await idle_reader.read()
            idle.close()
            with pytest.raises(ConnectionError):
                await rig.get("/late")
            fresh.write(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await fresh_reader.read()
            assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer.lower()
            fresh.close()
            assert other.pool.held == 1
            other.add("a", up.port)
            assert (await held).status == 200
            await stopping

    run(main())


def test_shutdown_finishes_requests_in_flight_and_answers_held_ones(proxy):
    gate = asyncio.Event()

    async def gated(up: Upstream, seen: Seen, reader, writer) -> bool:
        await gate.wait()
        return await echo_request(up, seen, reader, writer)

    async def main():
        async with upstream(gated) as up, proxy() as rig, proxy() as other:
            rig.add("a", up.port)
            flying = asyncio.create_task(rig.get("/flying"))
            await until(lambda: len(up.seen) == 1)
            held = asyncio.create_task(other.get("/held"))
            await until(lambda: other.pool.held == 1)
            idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", rig.port)
            await until(lambda: rig.connections() == 2)
            stopping = asyncio.gather(rig.stop(LIMIT_S), other.stop(LIMIT_S))
            got = await held
            assert got.status == 503 and got.json()["error"]["code"] == "shutting-down"
            assert await idle_reader.read(1) == b""
            idle_writer.close()
            with pytest.raises(ConnectionError):
                await rig.get("/late")
            gate.set()
            assert (await flying).status == 200
            await stopping

    run(main())


def test_shutdown_aborts_answers_after_the_grace(proxy):
    async def never(up: Upstream, seen: Seen, reader, writer) -> bool:
        await reader.read(1)
        return False

    async def main():
        async with upstream(never) as up, proxy() as rig:
            rig.add("a", up.port)
            flying = asyncio.create_task(rig.get("/flying"))
            await until(lambda: len(up.seen) == 1)
            await rig.stop(0.1)
            if isinstance(rig.server, ProxyServer):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await flying
            else:  # an ASGI application cannot close a connection before its answer begins
                assert (await flying).status == 502
            await until(lambda: rig.pool.outstanding == 0)

    run(main())


def test_admin_endpoints_need_the_token_and_never_reach_the_engine(proxy):
    async def main():
        async with upstream() as up, proxy(Settings(admin_token="s3cret")) as rig:
            rig.add("a", up.port)
            assert (await rig.get("/-/status")).status == 401
            assert (await rig.get("/-/status?token=wrong")).status == 401
            assert (await rig.get("/-/status?token=s3cret")).status == 401, "a token in a URL ends up in logs"
            status = await rig.get("/-/status", "Authorization: Bearer s3cret")
            assert status.status == 200 and status.json()["pools"][0]["ready"] is True
            assert (await rig.get("/-/ready")).status == 200, "a readiness probe has no token"
            assert (await rig.get("/-/nothing", "Authorization: Bearer s3cret")).status == 404
            assert (await rig.get("/-/status", method="POST", body=b"x")).status == 405
            assert not up.seen

    run(main())
