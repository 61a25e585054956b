"""Which requests wake an engine: probes of a sleeping engine are answered from its last answers, per credentials, and do not count as
use.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from plugin.options import WAKE_ON
from plugin.proxy.asgi import HoldMiddleware
from plugin.proxy.errors import StartFailed
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import Rig, Seen, Upstream, answer, echo_request, run, served_by_uvicorn, until, upstream

pytestmark = pytest.mark.t1

ONLY_ENGINES = Settings(wake_on=frozenset(WAKE_ON))
KEY = "Authorization: Bearer right"


async def engine(up: Upstream, seen: Seen, reader, writer) -> bool:
    """An engine whose /v1 needs a key, like vLLM and SGLang with --api-key."""
    if seen.target.startswith("/v1") and seen.header("authorization") != ["Bearer right"]:
        writer.write(answer(b'{"error":"no key"}', "401 Unauthorized"))
        return True
    if seen.target == "/metrics":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"4\r\na 1\n\r\n4\r\nb 2\n\r\n0\r\n\r\n")
        return True
    return await echo_request(up, seen, reader, writer)


@asynccontextmanager
async def sleeping_engine(proxy, handler=engine, settings=ONLY_ENGINES, **options):
    """Start a proxy whose engine wakes on demand; `rig.pool.sleep()` puts it to sleep."""
    async with upstream(handler) as up:

        async def wake() -> None:
            for phase in (Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                rig.trackers["a"].to(phase)

        async def sleep() -> None:
            rig.trackers["a"].to(Phase.ASLEEP)

        async with proxy(settings, wake=wake, sleep=sleep, **options) as rig:
            rig.add("a", up.port, phase=Phase.ASLEEP)
            yield rig, up


async def put_to_sleep(rig: Rig) -> None:
    await until(lambda: rig.pool.outstanding == 0 and rig.trackers["a"].phase is Phase.SERVING)
    assert await rig.pool.sleep()
    await until(lambda: rig.trackers["a"].phase is Phase.ASLEEP)


def test_probes_of_a_sleeping_engine_get_its_last_answers_and_do_not_wake_it(proxy):
    async def main():
        async with sleeping_engine(proxy) as (rig, up):
            assert (await rig.get("/v1/completions", KEY, method="POST", body=b"{}")).status == 200
            awake = {path: await rig.get(path) for path in ("/health", "/metrics", "/version", "/ping", "/v1/models")}
            listed = await rig.get("/v1/models", KEY)
            assert not any("quickthaw-state" in got.headers for got in (*awake.values(), listed))
            asked = len(up.seen)
            await put_to_sleep(rig)
            for path, before in awake.items():
                got = await rig.get(path)
                assert (got.status, got.body, got.headers["content-type"]) == (
                    before.status,
                    before.body,
                    before.headers["content-type"],
                )
                assert got.headers["quickthaw-state"] == "asleep" and int(got.headers["age"]) >= 0
                head = await rig.get(path, method="HEAD")
                assert head.status == before.status and head.headers["quickthaw-state"] == "asleep"
            got = await rig.get("/v1/models", KEY)
            assert got.status == 200 and got.body == listed.body
            assert rig.pool.waker.wakes == 1 and len(up.seen) == asked and rig.pool.held == 0
            assert (await rig.get("/v1/completions", KEY, method="POST", body=b"{}")).status == 200
            assert rig.pool.waker.wakes == 2, "a generation wakes it as before"

    run(main())


def test_an_answer_for_a_key_is_repeated_for_that_key_only(proxy):
    async def main():
        async with sleeping_engine(proxy) as (rig, up):
            await rig.get("/v1/x", KEY)
            assert (await rig.get("/v1/models", KEY)).status == 200
            await put_to_sleep(rig)
            for others in ((), ("Authorization: Bearer wrong",), ("X-Api-Key: right",), (KEY, "Cookie: a=b")):
                got = await rig.get("/v1/models", *others)
                assert got.status == 503 and got.json()["error"]["code"] == "engine-asleep", others
                assert got.headers["quickthaw-state"] == "asleep"
            assert (await rig.get("/v1/models", KEY)).status == 200
            # A refusal without a key is repeated without a key only.
            await rig.get("/v1/x", KEY)
            assert (await rig.get("/v1/models")).status == 401
            await put_to_sleep(rig)
            assert (await rig.get("/v1/models")).status == 401
            assert (await rig.get("/v1/models", "Authorization: Bearer wrong")).status == 503
            # A page that needs no key is answered with a key too.
            await rig.get("/v1/x", KEY)
            await rig.get("/metrics")
            await put_to_sleep(rig)
            assert (await rig.get("/metrics", "Authorization: Bearer any")).body == b"a 1\nb 2\n"

    run(main())


def test_probes_before_any_answer_was_seen(proxy):
    async def main():
        async with sleeping_engine(proxy) as (rig, up):
            for path in ("/health", "/ping", "/health?x=1", "/Health/"):
                got = await rig.get(path)
                assert got.status == 200 and got.json() == {"status": "asleep"}
                assert got.headers["quickthaw-state"] == "asleep" and "age" not in got.headers
            assert (await rig.get("/ping", method="POST")).status == 200
            assert (await rig.get("/-/ready")).status == 200
            for path in ("/metrics", "/version", "/v1/models", "/v1/models/m"):
                got = await rig.get(path)
                assert got.status == 503 and got.json()["error"]["code"] == "engine-asleep"
            assert not up.seen and rig.pool.waker.wakes == 0

    run(main())


def test_a_health_probe_of_an_unwakable_engine_gets_a_requests_refusal(proxy):
    async def main():
        async with sleeping_engine(proxy) as (rig, up):
            await rig.get("/v1/x", KEY)
            assert (await rig.get("/health")).status == 200
            await put_to_sleep(rig)
            rig.pool.start_failed(StartFailed("no-gpu", "the GPU is gone"))
            got = await rig.get("/health")
            assert got.status == 503 and got.json()["error"]["code"] == "no-gpu"
            assert got.headers["quickthaw-state"] == "asleep"
            assert (await rig.get("/-/ready")).status == 503

    run(main())


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/favicon.ico", 404),
        ("GET", "/robots.txt", 404),
        ("GET", "/", 404),
        ("GET", "/.env", 404),
        ("GET", "/wp-login.php?v1=1", 404),
        ("HEAD", "/docs", 404),
        ("POST", "/cgi-bin/x", 503),
        ("OPTIONS", "/v1/chat/completions", 404),
        ("OPTIONS", "/x", 404),
    ],
)
def test_unknown_paths_do_not_wake(proxy, method, target, status):
    async def main():
        async with sleeping_engine(proxy) as (rig, up):
            got = await rig.get(target, method=method, body=b"{}" if method == "POST" else b"")
            assert got.status == status and got.headers["quickthaw-state"] == "asleep"
            assert method == "HEAD" or got.json()["error"]["code"] == "engine-asleep"
            assert rig.pool.waker.wakes == 0 and not up.seen
            await rig.get("/v1/x", KEY)
            assert (await rig.get(target, method=method, body=b"{}" if method == "POST" else b"")).status in (200, 401)
            assert up.seen[-1].target == target, "an engine that is awake gets every request"

    run(main())


@pytest.mark.parametrize(
    ("method", "target", "more"),
    [
        ("POST", "/v1/chat/completions", ()),
        ("POST", "//v1/completions", ()),
        ("POST", "/v1%2Fcompletions", ()),
        ("GET", "/v1/responses/r1", ()),
        ("POST", "/generate_stream", ()),
        ("GET", "/health_generate", ()),
        ("POST", "/invocations", ()),
        ("POST", "/update_weights_from_disk", ()),
        ("GET", "/get_model_info", ()),
        ("OPTIONS", "/v1/chat/completions", ("Origin: http://a", "Access-Control-Request-Method: POST")),
    ],
)
def test_paths_that_engines_serve_wake(proxy, method, target, more):
    async def main():
        async with sleeping_engine(proxy, echo_request) as (rig, up):
            got = await rig.get(target, *more, method=method, body=b"{}" if method == "POST" else b"")
            assert got.status == 200 and rig.pool.waker.wakes == 1
            assert [seen.target for seen in up.seen] == [target]

    run(main())


def test_wake_on_selects_the_paths_that_wake(proxy):
    async def main():
        settings = Settings(wake_on=frozenset({"/own", "/a/*/run", "/health"}), root_path="/base")
        async with sleeping_engine(proxy, echo_request, settings) as (rig, up):
            for path in ("/v1/completions", "/owner", "/a/b", "/metrics", "/base/metrics"):
                assert (await rig.get(path)).status in (404, 503)
            assert rig.pool.waker.wakes == 0
            for n, path in enumerate(("/own", "/own/x", "/a/b/c/run", "/health", "/base/own"), 1):
                assert (await rig.get(path)).status == 200
                assert rig.pool.waker.wakes == n
                await put_to_sleep(rig)

    run(main())


@pytest.mark.slow
def test_an_engine_that_is_only_probed_goes_to_sleep(proxy):
    async def main():
        async with sleeping_engine(proxy, sleep_after_s=0.5) as (rig, up):
            await rig.get("/v1/x", KEY)
            await until(lambda: rig.pool.outstanding == 0)
            used = rig.pool.last_active
            assert (await rig.get("/health")).status == 200 and (await rig.get("/favicon.ico")).status == 200
            await until(lambda: rig.pool.outstanding == 0)
            assert rig.pool.last_active == used

            async def probe(*more: str) -> None:
                while rig.trackers["a"].phase is not Phase.ASLEEP:
                    await rig.get(*more)
                    await asyncio.sleep(0.02)

            async with asyncio.timeout(20):
                await asyncio.gather(
                    probe("/health"), probe("/metrics"), probe("/v1/models", KEY), probe("/favicon.ico")
                )
            assert rig.pool.probes == 0 and rig.pool.outstanding == 0
            assert rig.pool.sleeper.sleeps == 1 and rig.pool.waker.wakes == 1
            document = (await rig.get("/-/status")).json()
            assert document["pools"][0]["wakes"] == 1

    run(main())


def test_during_a_wake_probes_are_answered_and_requests_held(proxy):
    async def main():
        go = asyncio.Event()
        async with upstream(echo_request) as up:

            async def wake() -> None:
                rig.trackers["a"].to(Phase.WAKING)
                await go.wait()
                rig.trackers["a"].to(Phase.VERIFYING)
                rig.trackers["a"].to(Phase.SERVING)

            async with proxy(ONLY_ENGINES, wake=wake) as rig:
                rig.add("a", up.port, phase=Phase.ASLEEP)
                waiting = asyncio.create_task(rig.get("/v1/x"))
                await until(lambda: rig.pool.held == 1)
                got = await rig.get("/health")
                assert got.status == 200 and got.headers["quickthaw-state"] == "waking"
                got = await rig.get("/favicon.ico")
                assert got.status == 404 and got.headers["quickthaw-state"] == "waking"
                go.set()
                assert (await waiting).status == 200

    run(main())


def test_before_the_first_start_a_probe_waits_like_a_request(proxy):
    async def main():
        async with upstream(echo_request) as up, proxy(ONLY_ENGINES) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            waiting = asyncio.create_task(rig.get("/health"))
            await until(lambda: rig.pool.held == 1)
            rig.restore("a")
            got = await waiting
            assert got.json()["target"] == "/health" and "quickthaw-state" not in got.headers
            rig.trackers["a"].to(Phase.FAILED, "died")
            await until(lambda: rig.pool.ready() is None)
            got = await rig.get("/health")
            assert got.status == 200 and got.headers["quickthaw-state"] == "failed", (
                "held requests wait for its restart"
            )

    run(main())


def test_probes_are_not_held_while_a_snapshot_is_taken(proxy):
    async def main():
        async with sleeping_engine(proxy) as (rig, up):
            await rig.get("/v1/x", KEY)
            async with rig.pool.quiesced("a", 5):
                got = await rig.get("/health")
                assert got.status == 200 and got.headers["quickthaw-state"] == "busy"

    run(main())


def test_denied_paths_stay_denied(proxy):
    async def main():
        settings = Settings(wake_on=frozenset(WAKE_ON), denied_paths=frozenset({"/metrics", "/v1/models"}))
        async with sleeping_engine(proxy, echo_request, settings) as (rig, up):
            for _ in range(2):
                for path in ("/metrics", "/metricsx", "/v1/models", "/v1/models/m", "/%6Detrics"):
                    assert (await rig.get(path)).json()["error"]["code"] == "not-found"
                await rig.get("/v1/x")

    run(main())


@pytest.mark.parametrize(
    "head",
    [
        "Content-Encoding: gzip",
        "Set-Cookie: a=b",
        "Cache-Control: no-store",
        "Cache-Control: Private",
        "500 Internal Server Error",
        "302 Found",
        "large",
    ],
)
def test_answers_that_are_not_remembered(proxy, head):
    async def other(up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target == "/metrics":
            body = b"x" * ((256 << 10) + 1) if head == "large" else b"x"
            status = head if head[0].isdigit() else "200 OK"
            writer.write(answer(body, status, *([head] if ":" in head else [])))
            return True
        return await echo_request(up, seen, reader, writer)

    async def main():
        async with sleeping_engine(proxy, other) as (rig, up):
            await rig.get("/v1/x")
            await rig.get("/metrics")
            await rig.get("/health", method="HEAD")
            await put_to_sleep(rig)
            assert (await rig.get("/metrics")).json()["error"]["code"] == "engine-asleep"
            assert (await rig.get("/health")).json() == {"status": "asleep"}

    run(main())


def test_an_aborted_answer_is_not_remembered(proxy):
    async def cuts(up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target == "/metrics":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            return False
        return await echo_request(up, seen, reader, writer)

    async def main():
        async with sleeping_engine(proxy, cuts) as (rig, up):
            await rig.get("/v1/x")
            await rig.get("/metrics")
            await put_to_sleep(rig)
            assert (await rig.get("/metrics")).status == 503

    run(main())


def test_the_middleware_answers_probes_of_its_paths_only():
    async def answers(request):
        return JSONResponse({"path": request.url.path})

    async def main():
        async def wake() -> None:
            for phase in (Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
                rig.trackers["a"].to(phase)

        pool = ReplicaPool(wake=wake)
        app = Starlette(routes=[Route("/{rest:path}", answers, methods=["GET", "POST"])])
        held = HoldMiddleware(app, pool, ONLY_ENGINES)
        async with served_by_uvicorn(held, date_header=False) as (port, _):
            rig = Rig(held.proxy, pool, port)
            rig.add("a", 1, phase=Phase.ASLEEP)
            got = await rig.get("/health")
            assert got.status == 200 and got.json() == {"status": "asleep"}
            assert (await rig.get("/favicon.ico")).status == 404 and pool.waker.wakes == 0
            assert (await rig.get("/v1/x")).json() == {"path": "/v1/x"} and pool.waker.wakes == 1
            active = pool.last_active
            assert (await rig.get("/health")).json() == {"path": "/health"}, "of the application, once an engine serves"
            assert pool.last_active == active and pool.probes == 0

    run(main())


def test_the_memory_is_bounded_and_keeps_requested_answers():
    from plugin.proxy.http.request import Request
    from plugin.proxy.probes import Memory
    from plugin.proxy.probes import Seen as Answer

    def asked(target: bytes, *headers: tuple[bytes, bytes]) -> Request:
        request = Request()
        request.method, request.target = b"GET", target
        request.headers = [(name, name, value) for name, value in headers]
        return request

    memory = Memory()
    memory.keep(asked(b"/health"), Answer(200, b"", b"up"))
    for n in range(200):
        memory.keep(asked(b"/v1/models/%d" % n), Answer(200, b"", b"x"))
        assert memory.find(asked(b"/health")) is not None
        # Refused keys, and keys for a page that needs none, are not remembered.
        memory.keep(asked(b"/health", (b"authorization", b"%d" % n)), Answer(200, b"", b"mine"))
        memory.keep(asked(b"/v1/models", (b"x-api-key", b"%d" % n)), Answer(401, b"", b"no"))
    assert len(memory._answers) == 32
    memory.keep(asked(b"/metrics", (b"user-agent", b"Prometheus/3.1")), Answer(200, b"", b"open"))
    assert memory.find(asked(b"/metrics", (b"user-agent", b"curl/8"), (b"sec-fetch-user", b"?1"))).body == b"open"
    assert memory.find(asked(b"/metrics", (b"x-user", b"ann"))).body == b"open"
    assert memory.find(asked(b"/health", (b"authorization", b"7"))).body == b"up"
    assert memory.find(asked(b"/v1/models", (b"x-api-key", b"7"))) is None
    memory.keep(asked(b"/v1/models", (b"authorization", b"Bearer s3cret")), Answer(200, b"", b"ours"))
    assert memory.find(asked(b"/v1/models", (b"authorization", b"Bearer s3cret"))).body == b"ours"
    assert "s3cret" not in repr(vars(memory))
    memory.keep(asked(b"/v1/models", (b"authorization", b"Bearer s3cret")), Answer(401, b"", b"revoked"))
    assert memory.find(asked(b"/v1/models", (b"authorization", b"Bearer s3cret"))) is None
