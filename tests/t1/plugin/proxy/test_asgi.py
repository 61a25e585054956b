"""Features of the ASGI application only: a lifespan, a mount path, middlewares around it, refused WebSockets, and `HoldMiddleware`.
What it shares with the port is tested in `pool/test_hold.py` and the other tests that take `proxy`.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute

from plugin.proxy.asgi import HoldMiddleware, hold_app
from plugin.proxy.http.address import tcp
from plugin.proxy.http.asgi_client import AsgiClient, request_of, target_of
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase, PhaseTracker
from tests.kits.proxy.rig import (
    LIMIT_S,
    Rig,
    Seen,
    Upstream,
    answer,
    answering,
    asgi_proxy,
    read_answer,
    run,
    served_by_uvicorn,
    until,
    upstream,
)

pytestmark = pytest.mark.t1


@asynccontextmanager
async def gateway(app, proxy, pool):
    """Start a rig around a Starlette application that contains a proxy."""
    async with served_by_uvicorn(app, date_header=False) as (port, server):
        yield Rig(proxy, pool, port), server


def mounted(settings: Settings | None = None, *middleware: Middleware):
    """Build a gateway with a page of its own, and the proxy under /llm."""
    pool = ReplicaPool()
    inner = hold_app(pool, settings or Settings())

    @asynccontextmanager
    async def lifespan(app):
        async with inner.router.lifespan_context(inner):
            yield

    async def mine(request):
        return JSONResponse({"mine": True})

    routes = [Route("/health", mine), Mount("/llm", app=inner)]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan), inner.state.proxy, pool


def test_below_a_mount_the_engine_sees_the_rest_of_the_path():
    async def main():
        async with upstream() as up, gateway(*mounted(Settings(denied_paths=frozenset({"/sleep"})))) as (rig, _):
            rig.add("a", up.port, phase=Phase.IDLE)
            assert (await rig.get("/health")).json() == {"mine": True}, "the gateway's own page wakes no engine"
            waiting = asyncio.create_task(rig.get("/llm/v1/models?q=%20"))
            await until(lambda: rig.pool.held == 1)
            rig.restore("a")
            assert (await waiting).json()["target"] == "/v1/models?q=%20"
            assert (await rig.get("/llm/a%2Fb%20c")).json()["target"] == "/a%2Fb%20c", "escapes are unchanged"
            assert (await rig.get("/ll%6D/x")).json()["target"] == "/x"
            for path in ("/llm/sleep", "/llm/%73leep", "/llm//sleep", "/llm/x/../sleep", "/llm/sleep/now"):
                assert (await rig.get(path)).json()["error"]["code"] == "not-found"
            assert (await rig.get("/llm/-/ready?strict=1")).status == 200
            assert (await rig.get("/llm/-/status")).json()["pools"][0]["ready"] is True
            page = (await rig.get("/llm/-/")).body
            assert b'"/llm/-/status"' in page and b'"/-/status"' not in page, "its links lead below the mount"
            assert {seen.target for seen in up.seen} == {"/v1/models?q=%20", "/a%2Fb%20c", "/x"}

    run(main())


def test_a_sign_in_below_a_mount_sets_a_cookie_for_that_path():
    async def main():
        async with gateway(*mounted(Settings(admin_token="s3cret"))) as (rig, _):
            got = await rig.get("/llm/-/sign-in", method="POST", body=b"token=s3cret")
            assert got.status == 200 and "; Path=/llm/-;" in got.headers["set-cookie"]
            cookie = got.headers["set-cookie"].partition(";")[0]
            assert (await rig.get("/llm/-/status")).status == 401
            assert (await rig.get("/llm/-/status", f"Cookie: {cookie}")).status == 200

    run(main())


def test_without_a_lifespan_the_first_request_starts_the_proxy():
    async def main():
        pool = ReplicaPool()
        inner = hold_app(pool)
        async with (
            upstream() as up,
            gateway(Starlette(routes=[Mount("/llm", app=inner)]), inner.state.proxy, pool) as (rig, _),
        ):
            rig.add("a", up.port)
            assert (await rig.get("/llm/x")).json()["target"] == "/x"
            await rig.server.shutdown(0.02)

    run(main())


class Passing(BaseHTTPMiddleware):
    """A typical gateway middleware: it reads the answer and sends it on."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


@pytest.mark.parametrize(
    ("framing", "middleware"),
    [
        (b"Content-Length: 100", ()),
        (b"Transfer-Encoding: chunked", ()),
        # Without a length, Starlette's BaseHTTPMiddleware ends an aborted answer as if it were complete.
        (b"Content-Length: 100", (Middleware(Passing),)),
    ],
    ids=["length", "chunked", "length behind a middleware"],
)
def test_an_aborted_answer_does_not_look_complete(framing, middleware):
    async def cuts(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        return False

    async def main():
        async with upstream(cuts) as up, gateway(*mounted(None, *middleware)) as (rig, _):
            rig.add("a", up.port)
            got = await rig.get("/llm/x")
            assert got.status == 200 and not got.whole
            assert rig.server.stats.outcomes["upstream-cut"] == 1

    run(main())


def test_hop_by_hop_headers_are_removed_in_both_directions():
    said = answer(b"{}", "200 OK", "Connection: X-Mine", "X-Mine: 1", "Keep-Alive: timeout=5", "X-Other: 2")

    async def main():
        async with upstream(answering(said)) as up, asgi_proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get(
                "/x", "Connection: keep-alive, X-Own", "X-Own: 1", "TE: trailers", "X-Forwarded-For: 6.6.6.6"
            )
            assert got.headers["x-other"] == "2" and not {"x-mine", "keep-alive"} & got.headers.keys()
            seen = up.seen[0]
            assert not {name.lower() for name, _ in seen.headers} & {"connection", "x-own", "te"}
            assert seen.header("x-forwarded-for") == ["127.0.0.1"] and seen.header("host") == ["127.0.0.1"]
            assert seen.header("x-request-id") == [got.headers["x-request-id"]]
            assert (await rig.get("/", method="HEAD")).headers["content-length"] == "2"

    run(main())


def test_304_204_and_100_continue():
    async def kinds(up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target == "/304":
            writer.write(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n")
        elif seen.target == "/204":
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            writer.write(answer(b"%d" % len(seen.body)))
        return True

    async def main():
        async with upstream(kinds) as up, asgi_proxy() as rig:
            rig.add("a", up.port)
            assert (await rig.get("/304")).status == 304 and (await rig.get("/204")).status == 204
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            async with asyncio.timeout(LIMIT_S):
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await read_answer(reader)).body == b"3"
            writer.close()

    run(main())


def test_a_websocket_is_refused_by_name_and_wakes_no_engine():
    from websockets.asyncio import client as websockets
    from websockets.exceptions import InvalidStatus

    async def main():
        async with asgi_proxy() as rig:
            with pytest.raises(InvalidStatus) as refused:
                async with websockets.connect(f"ws://127.0.0.1:{rig.port}/v1/realtime"):
                    pass
            assert refused.value.response.status_code == 501
            assert b"websocket-unsupported" in refused.value.response.body and rig.pool.held == 0

    run(main())


def test_draining_answers_held_requests_and_finishes_those_in_flight():
    """On SIGTERM the server's signal handler calls `drain`, then the server waits for its requests."""
    gate = asyncio.Event()

    async def gated(up: Upstream, seen: Seen, reader, writer) -> bool:
        await gate.wait()
        writer.write(answer())
        return True

    async def main():
        async with upstream(gated) as up, gateway(*mounted()) as (rig, server):
            rig.add("a", up.port)
            flying = asyncio.create_task(rig.get("/llm/flying"))
            await until(lambda: len(up.seen) == 1)
            rig.trackers["a"].to(Phase.FAILED, "x")
            held = asyncio.create_task(rig.get("/llm/held"))
            await until(lambda: rig.pool.held == 1)
            rig.server.drain()
            server.should_exit = True
            assert (await held).json()["error"]["code"] == "shutting-down"
            gate.set()
            assert (await flying).status == 200

    run(main())


SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "path": "/x",
    "raw_path": b"/x",
    "query_string": b"",
    "headers": [(b"host", b"t"), (b"content-length", b"3")],
}


@pytest.mark.parametrize("sent", [[b"ab"], [b"ab", b"cd"], [b""]], ids=["shorter", "longer", "none"])
def test_a_body_of_another_length_than_announced_is_refused(sent):
    """A middleware may change a body. The engine would read the surplus as the next request's head."""

    async def main():
        async with upstream() as up, asgi_proxy() as rig:
            rig.add("a", up.port)
            messages = [{"type": "http.request", "body": part, "more_body": True} for part in sent]
            messages[-1]["more_body"] = False
            said = []

            async def receive():
                return messages.pop(0) if messages else await asyncio.Event().wait()

            async def send(message):
                said.append(message)

            async with asyncio.timeout(LIMIT_S):
                await AsgiClient(rig.server, dict(SCOPE), receive, send).run()
            assert said[0]["status"] == 400 and b"body-length" in said[1]["body"]
            assert all(len(seen.body) <= 3 for seen in up.seen)

    run(main())


def test_a_middlewares_exception_while_the_body_is_read_ends_the_request():
    async def limiting(scope, receive, send):
        async def limited():
            await receive()
            raise HTTPException(413, "too large")

        await app(scope, limited if scope["type"] == "http" else receive, send)

    app, proxy, pool = mounted()

    async def main():
        async with upstream() as up, gateway(limiting, proxy, pool) as (rig, _):
            rig.add("a", up.port)
            async with asyncio.timeout(LIMIT_S):
                assert (await rig.get("/llm/x", method="POST", body=b"abc")).status == 413
            assert proxy.buffered == 0 and not proxy.clients

    run(main())


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"headers": [(b"host", b"t"), (b"x", b"a\r\nevil: 1")]}, "malformed-request"),
        ({"headers": [(b"host", b"t"), (b"content-length", b"3"), (b"content-length", b"4")]}, "malformed-request"),
        ({"headers": [(b"host", b"t"), (b"content-length", b"-3")]}, "malformed-request"),
        ({"headers": []}, "host"),
        ({"raw_path": b"/x HTTP/1.1\r\nevil: 1"}, "target"),
        (
            {"headers": [(b"host", b"t"), (b"connection", b"upgrade"), (b"upgrade", b"websocket")], "method": "GET"},
            "websocket-unsupported",
        ),
    ],
)
def test_an_invalid_scope_is_refused(changed, code):
    assert request_of(SCOPE | changed).fault.code == code
    assert request_of(SCOPE).fault is None and request_of(SCOPE | {"scheme": "https"}).scheme == b"https"


@pytest.mark.parametrize(
    ("root", "path", "raw", "target"),
    [
        ("", "/a b", b"/a%20b", b"/a%20b"),
        ("/llm", "/llm/a", b"/llm/a", b"/a"),
        ("/llm", "/llm", b"/llm", b"/"),
        ("/l m", "/l m/a/b", b"/l%20m/a%2fb", b"/a%2fb"),
        ("/llm", "/llm/a b", None, b"/a%20b"),
        ("/outer", "/x", b"/x", b"/x"),
    ],
)
def test_the_target_is_the_sent_path_below_the_mount(root, path, raw, target):
    assert target_of({"root_path": root, "path": path, "raw_path": raw, "query_string": b""}) == target


# -- HoldMiddleware ------------------------------------------------------------------------------------


def middleware_gateway(settings: Settings | None = None, **pool_options):
    """Start an application with its own pages behind a HoldMiddleware for /v1."""
    pool = ReplicaPool(**pool_options)

    async def engine(request):
        replica = request.state.replica
        body = await request.body()
        return JSONResponse({"replica": replica.name, "outstanding": pool.outstanding, "length": len(body)})

    async def mine(request):
        return JSONResponse({"mine": True})

    app = Starlette(routes=[Route("/v1/{rest:path}", engine, methods=["GET", "POST"]), Route("/health", mine)])
    held = HoldMiddleware(app, pool, settings, paths=("/v1",))
    return held, held.proxy, pool


def test_the_middleware_holds_and_the_application_answers():
    async def main():
        async with gateway(*middleware_gateway()) as (rig, _):
            rig.pool.add("a", tracker := PhaseTracker(), tcp("127.0.0.1", 1))
            rig.trackers["a"] = tracker
            assert (await rig.get("/health")).json() == {"mine": True}
            waiting = [asyncio.create_task(rig.get(f"/v1/{n}", method="POST", body=bytes(100_000))) for n in range(5)]
            await until(lambda: rig.pool.held == 5)
            rig.restore("a")
            for got in await asyncio.gather(*waiting):
                assert (
                    got.json()["replica"] == "a" and got.json()["length"] == 100_000 and got.json()["outstanding"] >= 1
                )
            assert rig.pool.outstanding == 0 and rig.pool.replicas["a"].served == 5

    run(main())


def test_the_middleware_refuses_with_the_same_codes():
    async def main():
        settings = Settings(hold_timeout_s=0.2, denied_paths=frozenset({"/v1/secret"}))
        async with gateway(*middleware_gateway(settings)) as (rig, _):
            got = await rig.get("/v1/x")
            assert got.status == 503 and got.json()["error"]["code"] == "hold-deadline" and "retry-after" in got.headers
            assert (await rig.get("/v1/%73ecret")).status == 404
            assert (await rig.get("/v1/x", "X-Quickthaw-Hold: soon")).json()["error"]["code"] == "hold"
            assert (await rig.get("/v1/x", "X-Quickthaw-Hold: 0")).json()["error"]["code"] == "hold-deadline"
            rig.server.drain()
            assert (await rig.get("/v1/x")).json()["error"]["code"] == "shutting-down"

    run(main())


def test_the_middleware_drops_held_requests_of_disconnected_clients():
    async def main():
        async with gateway(*middleware_gateway()) as (rig, _):
            rig.pool.add("a", tracker := PhaseTracker(), tcp("127.0.0.1", 1))
            rig.trackers["a"] = tracker
            _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST /v1/x HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc")
            await until(lambda: rig.pool.held == 1)
            writer.transport.abort()
            await until(lambda: rig.pool.held == 0)
            rig.restore("a")
            assert rig.pool.outstanding == 0 and rig.pool.replicas["a"].served == 0

    run(main())


def test_another_middlewares_exception_ends_a_held_request():
    async def receive():
        raise HTTPException(413, "too large")

    async def main():
        held, proxy, pool = middleware_gateway()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(HTTPException):
                await held(SCOPE | {"path": "/v1/x", "raw_path": b"/v1/x"}, receive, None)
        await until(lambda: pool.held == 0)
        assert not proxy.stats.outcomes
        await proxy.shutdown()

    run(main())


def test_the_middleware_holds_a_websocket_and_refuses_one_by_name():
    from websockets.asyncio import client as websockets
    from websockets.exceptions import InvalidStatus

    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(f"{websocket.state.replica.name}: {await websocket.receive_text()}")
        await websocket.close()

    async def main():
        pool = ReplicaPool()
        held = HoldMiddleware(
            Starlette(routes=[WebSocketRoute("/v1/realtime", echo)]), pool, Settings(hold_timeout_s=20)
        )
        async with gateway(held, held.proxy, pool) as (rig, _):
            rig.pool.add("a", tracker := PhaseTracker(), tcp("127.0.0.1", 1))
            rig.trackers["a"] = tracker
            url = f"ws://127.0.0.1:{rig.port}/v1/realtime"
            asyncio.get_running_loop().call_later(0.1, rig.restore, "a")
            async with websockets.connect(url) as client:
                await client.send("hello")
                assert await client.recv() == "a: hello"
            await until(lambda: pool.outstanding == 0)
            held.proxy.drain()
            with pytest.raises(InvalidStatus) as refused:
                async with websockets.connect(url):
                    pass
            assert refused.value.response.status_code == 503 and b"shutting-down" in refused.value.response.body

    run(main())
