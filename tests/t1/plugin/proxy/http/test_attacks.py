"""Attacking clients: malformed, ambiguous or misdirected requests are refused, and the engine never sees them."""

from __future__ import annotations

import asyncio
import json

import pytest

from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase
from tests.kits.proxy.attacks import MATCHED_BY_PREFIX, spellings
from tests.kits.proxy.rig import FACES, LIMIT_S, proxy, read_answer, run, until, upstream

pytestmark = pytest.mark.t1

POST = b"POST /v1/x HTTP/1.1\r\nHost: t\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: t\r\n\r\n"

REFUSED = {
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n" + SMUGGLED,
    "equal lengths": POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "length list": POST + b"Content-Length: 0, 5\r\n\r\n" + SMUGGLED,
    "length with sign": POST + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "length in hex": POST + b"Content-Length: 0x0\r\n\r\n" + SMUGGLED,
    "length too long": POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + SMUGGLED,
    "length and chunked": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked list": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n" + SMUGGLED,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked with vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked quoted": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n' + SMUGGLED,
    "chunked on HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "space before colon": POST + b"Content-Length : 5\r\n\r\n" + SMUGGLED,
    "tab before colon": POST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "folded header": POST + b"X: a\r\n Content-Length: 5\r\n\r\n" + SMUGGLED,
    "bare LF": b"GET /v1/x HTTP/1.1\nHost: t\n\n" + SMUGGLED,
    "bare CR in a value": POST + b"X: a\rContent-Length: 5\r\n\r\n" + SMUGGLED,
    "NUL in a value": POST + b"X: a\0b\r\n\r\n" + SMUGGLED,
    "empty name": POST + b": a\r\n\r\n" + SMUGGLED,
    "no colon": POST + b"Content-Length\r\n\r\n" + SMUGGLED,
    "no host": b"GET / HTTP/1.1\r\n\r\n" + SMUGGLED,
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + SMUGGLED,
    "bad version": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n" + SMUGGLED,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "HTTP/0.9": b"GET /v1/x\r\n\r\n" + SMUGGLED,
    "connect": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED,
    "trace": b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED,
    "fragment": b"GET /v1/x#/../sleep HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED,
    "user in the target": b"GET http://a@b/ HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED,
    "8-bit target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED,
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED,
    "chunk size negative": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + SMUGGLED,
    "chunk size overflow": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n" + SMUGGLED,
    "chunk without CRLF": POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n" + SMUGGLED,
    "chunk ended by LF": POST + b"Transfer-Encoding: chunked\r\n\r\n0\n\n" + SMUGGLED,
    "length in a trailer": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n" + SMUGGLED,
    "many headers": POST + b"X: 1\r\n" * 500 + b"\r\n" + SMUGGLED,
    "large header": POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n" + SMUGGLED,
    "endless header": POST + b"X: " + b"a" * 1_000_000,
    "endless trailer": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 1_000_000,
    "endless chunk extension": POST + b"Transfer-Encoding: chunked\r\n\r\n3;" + b"a" * 1_000_000,
    "endless blank lines": b"\r\n" * 500_000,
    "endless target": b"GET /" + b"a" * 1_000_000,
    "unknown expectation": POST + b"Expect: the unexpected\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "upgrade with a body": b"GET / HTTP/1.1\r\nHost: t\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 9\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00" * 10,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_request_is_refused_and_nothing_after_it_is_read(name):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(REFUSED[name])
            async with asyncio.timeout(LIMIT_S):
                raw = await reader.read(-1)
            writer.close()
            status = int(raw.split(b" ")[1])
            assert status in (400, 405, 408, 417, 431, 501, 505), raw
            assert raw.count(b"HTTP/1.1 ") == 1, "exactly one answer"
            assert b"connection: close" in raw
            bodies = [s for s in up.seen if not s.gone]
            assert not [s for s in bodies if "smuggled" in s.target], "the smuggled request arrived"
            assert not [s for s in up.seen if s.target != "/v1/x"], [s.target for s in up.seen]
            # only a fault after a valid head may show the engine that head, and then never a complete body
            late = ("chunk", "length in a trailer", "endless trailer", "endless chunk")
            assert not up.seen or name.startswith(late)

    run(main())


FAULTS = {
    400: {
        "host": "",
        "two hosts": "Host: a\r\nHost: b\r\n",
        "bare line end": "Host: t\r\nX: a\n b\r\n",
        "fold": "Host: t\r\nX: a\r\n b\r\n",
    },
    405: {"method": "Host: t\r\n"},
    417: {"expectation": "Host: t\r\nExpect: more\r\n"},
    431: {"headers": "Host: t\r\n" + "X: 1\r\n" * 500},
    501: {"coding": "Host: t\r\nTransfer-Encoding: gzip\r\n"},
}


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/messages/count_tokens?beta=true", "http://t/v1/messages", "/api/v1/messages"]
)
@pytest.mark.parametrize(("status", "name"), [(status, name) for status, heads in FAULTS.items() for name in heads])
def test_an_error_has_the_shape_of_its_paths_api(status, name, path):
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            method = "TRACE" if status == 405 else "POST"
            for target, anthropic in ((path, True), (path.replace("messages", "models"), False)):
                raw = await rig.raw(
                    f"{method} {target} HTTP/1.1\r\n{FAULTS[status][name]}\r\n".encode(), until_close=True
                )
                head, _, body = raw.partition(b"\r\n\r\n")
                assert int(head.split(b" ")[1]) == status, raw
                found = json.loads(body)
                assert found["error"]["code"] and found["error"]["message"]
                assert (found.get("type") == "error") is anthropic, found
                assert "request_id" in found if anthropic else found["error"]["param"] is None
            assert not up.seen

    run(main())


DENIED = ["/sleep", "/collective_rpc", "/v1/load_lora_adapter", "/metrics"]


CLOSED = [
    *spellings("/sleep", "/api"),
    *spellings("/metrics"),
    *MATCHED_BY_PREFIX,
    "/collective_rpc/anything",
    "/v1/%6coad_lora_adapter",
    "/x/../-/status",
    "/%2d/status",
    "//-/status",
    "/-/../sleep",
    "/-/%2e%2e/sleep",
    "/-%2f../v1/x",
    "http://t/%2d/status",
]


@pytest.mark.parametrize("face", FACES)
def test_no_spelling_of_a_denied_path_reaches_the_engine(face):
    async def main():
        closed = Settings(denied_paths=frozenset(DENIED), root_path="/api")
        async with upstream() as up, FACES[face](closed) as rig:
            rig.add("a", up.port)
            for target in CLOSED:
                got = await rig.get(target, method="POST")
                assert got.status in (400, 404), (target, got)
                if got.headers["content-type"] == "application/json":  # otherwise uvicorn has refused it
                    assert got.json()["error"]["code"] in ("not-found", "malformed-request"), target
                # a WebSocket handshake is checked in the same way
                raw = await rig.raw(
                    f"GET {target} HTTP/1.1\r\nHost: t\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n".encode()
                )
                assert raw.split(b" ")[1] in ((b"400", b"404") if face == "port" else (b"400", b"404", b"426", b"501"))
                assert not up.seen, target

    run(main())


@pytest.mark.parametrize(
    "target", ["/sleepy", "/v1/sleep", "/-", "/x/-/y", "/v1/models", "/v1/metrics", "/v1/models/a%2fb..c;d", "*"]
)
def test_paths_similar_to_denied_ones_pass(target):
    async def main():
        async with upstream() as up, proxy(Settings(denied_paths=frozenset(DENIED), admin_prefix="/own")) as rig:
            rig.add("a", up.port)
            got = await rig.get(target, method="OPTIONS" if target == "*" else "GET")
            assert got.status == 200 and up.seen[0].target == target

    run(main())


def test_an_absolute_form_target_is_forwarded_as_a_path():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get("http://other:81/v1/x?y=1")
            assert got.status == 200
            assert up.seen[0].target == "/v1/x?y=1" and up.seen[0].header("host") == ["other:81"]

    run(main())


def test_connection_cannot_remove_protected_headers():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            got = await rig.get(
                "/", "Connection: close, Content-Length, Host, Cookie", "Cookie: c", method="POST", body=b"abc"
            )
            assert got.json()["length"] == 3
            assert up.seen[0].header("content-length") == ["3"] and up.seen[0].header("cookie") == ["c"]

    run(main())


def test_a_request_id_that_could_forge_a_log_is_replaced():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            for evil in ("x" * 200, 'a"b', "a b"):
                got = await rig.get("/", f"X-Request-Id: {evil}")
                assert got.headers["x-request-id"] != evil and len(got.headers["x-request-id"]) == 24

    run(main())


def test_clients_over_the_limit_get_an_answer_and_the_others_are_served():
    async def main():
        async with upstream() as up, proxy(Settings(max_clients=5)) as rig:
            rig.add("a", up.port)
            inside = [await asyncio.open_connection("127.0.0.1", rig.port) for _ in range(5)]
            await until(lambda: len(rig.server.clients) == 5)
            got = await asyncio.gather(*(rig.raw(b"", until_close=True) for _ in range(20)))
            assert all(raw.startswith(b"HTTP/1.1 503 ") and b"too-many-clients" in raw for raw in got)
            for reader, writer in inside:
                writer.write(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
                assert (await read_answer(reader)).status == 200
                writer.close()
            await until(lambda: len(rig.server.clients) < 5)
            assert (await rig.get("/")).status == 200

    run(main())


@pytest.mark.parametrize("held", [False, True])
def test_a_half_closed_client_counts_as_disconnected(held):
    """A close and a half-close look alike here. Not running requests for disconnected clients matters more (nginx does the same)."""

    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port, phase=Phase.IDLE if held else Phase.SERVING)
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nab")
            await until(lambda: rig.pool.held == 1 if held else len(up.seen) == 1)
            writer.write_eof()
            async with asyncio.timeout(LIMIT_S):
                try:
                    assert await reader.read(-1) == b""
                except ConnectionError:
                    pass
            writer.close()
            await until(lambda: rig.server.stats.outcomes["client-gone"] == 1)
            assert len(up.seen) == (not held)
            await until(lambda: all(seen.gone for seen in up.seen))

    run(main())


def test_a_flood_of_pipelined_requests_is_limited():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)
            one = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"
            raw = await rig.raw(one * 2000, until_close=True)
            assert 1 <= raw.count(b"HTTP/1.1 200") <= 2000
            assert raw.rstrip().endswith(b"}") and raw.count(b"HTTP/1.1 429") == 1

    run(main())
