"""The admin endpoints: who may read them, the meaning of ready and live, and where an engine's last output lines go."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager

import pytest

from launchers.errors import EngineDied
from plugin.proxy.admin.access import SESSION_S, is_local
from plugin.proxy.errors import StartFailed
from plugin.proxy.http.request import Request
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase
from tests.kits.proxy.rig import Rig, answer, proxy, read_answer, run, until, upstream

pytestmark = pytest.mark.t1

CLOSED = ["/-/status", "/-/metrics", "/-/", "/-", "/-/anything"]
OPEN = ["/-/live", "/-/ready", "/-/ready?strict=1"]
BEARER = "Authorization: Bearer s3cret"
THROUGH_A_PROXY = [
    "X-Forwarded-For: 10.0.0.9",
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Proto: https",
    "Forwarded: for=127.0.0.1",
    "X-Real-IP: 10.0.0.9",
    "Via: 1.1 nginx",
]


def a_host_address() -> str:
    """Return an address of this host other than loopback, or skip."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            found = probe.getsockname()[0]
        except OSError:
            pytest.skip("this host has no address but loopback")
    if found.startswith("127."):
        pytest.skip("this host has no address but loopback")
    return str(found)


async def get(address: str, port: int, path: str, *more: str, host: str = "127.0.0.1"):
    reader, writer = await asyncio.open_connection(address, port)
    writer.write("\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *more]).encode() + b"\r\n\r\n")
    try:
        return await read_answer(reader)
    finally:
        writer.close()


@asynccontextmanager
async def everywhere(settings: Settings | None = None, *, own: bool = False):
    """Start a proxy on every address of this host, and on an admin port if it has one."""
    sock = socket.create_server(("0.0.0.0", 0))
    admin_sock = socket.create_server(("0.0.0.0", 0)) if own else None
    pool = ReplicaPool()
    server = ProxyServer(pool, settings or Settings())
    await server.start(sock, admin_sock=admin_sock)
    try:
        yield Rig(server, pool, (admin_sock or sock).getsockname()[1])
    finally:
        await server.shutdown(0.02)


def test_only_clients_of_this_host_can_read_the_pages():
    async def main():
        address = a_host_address()
        async with upstream() as up, everywhere() as rig:
            rig.add("a", up.port)
            for path in CLOSED:
                assert (await get("127.0.0.1", rig.port, path)).status in (200, 404), path
                found = await get(address, rig.port, path, host="localhost")
                assert found.status == 403 and found.json()["error"]["code"] == "admin-local-only", path
            for path in OPEN:
                assert (await get(address, rig.port, path, host=address)).status == 200, path
            assert not up.seen

    run(main())


@pytest.mark.parametrize("header", THROUGH_A_PROXY)
def test_requests_through_a_local_reverse_proxy_are_not_local(header):
    async def main():
        async with proxy() as rig:
            for path in CLOSED:
                assert (await rig.get(path, header)).status == 403, path
            assert (await rig.get("/-/live", header)).status == 200

    run(main())


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "10.0.0.9", "localhost.evil.example", "127.0.0.1.evil"]
)
def test_a_web_page_cannot_read_them_through_a_local_browser(host):
    """DNS rebinding: the browser connects to 127.0.0.1 and sends the web page's own host name."""

    async def main():
        async with proxy() as rig:
            assert (await get("127.0.0.1", rig.port, "/-/status", host=host)).status == 403

    run(main())


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:9", "[::1]", "[::1]:8000"])
@pytest.mark.parametrize("peer", [b"127.0.0.1", b"127.9.9.9", b"::1", b"::ffff:127.0.0.1"])
def test_all_loopback_addresses_are_recognised(host, peer):
    request = Request()
    request.host = host.encode()
    assert is_local(request, peer)
    for other in (b"10.0.0.1", b"::ffff:10.0.0.1", b"fe80::1%eth0", b"unix", b""):
        assert not is_local(request, other), "a UNIX socket is where a reverse proxy connects"


def test_the_token_is_required_and_accepted_from_any_address():
    async def main():
        address = a_host_address()
        async with everywhere(Settings(admin_token="s3cret")) as rig:
            for path in ("/-/status", "/-/metrics", "/-/"):
                assert (await get(address, rig.port, path, BEARER)).status == 200
                assert (await get(address, rig.port, path, BEARER, "X-Forwarded-For: 10.0.0.9")).status == 200
            for wrong in (
                "",
                "Authorization: Bearer s3cre",
                "Authorization: Bearer s3crets",
                "Authorization: Basic s3cret",
            ):
                refused = await get("127.0.0.1", rig.port, "/-/status", wrong or "X: y")
                assert refused.status == 401 and "s3cret" not in refused.body.decode()
                assert refused.headers["www-authenticate"].startswith("Bearer")
            for path in OPEN[:2]:
                assert (await get(address, rig.port, path, host=address)).status in (200, 503)

    run(main())


async def post(rig: Rig, name: str, form: str = "", *more: str, source: str = "127.0.0.1"):
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, local_addr=(source, 0))
    head = [f"POST /-/{name} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(form)}", *more]
    writer.write(("\r\n".join(head) + "\r\n\r\n" + form).encode())
    try:
        return await read_answer(reader)
    finally:
        writer.close()


def test_a_session_begins_with_the_token_and_ends_by_signing_out():
    async def main():
        async with upstream() as up, proxy(Settings(admin_token="s3cret&+")) as rig:
            rig.add("a", up.port)
            for form in ("", "token=", "token=s3cret", "s3cret&+", "token=" + "x" * 5000):
                refused = await post(rig, "sign-in", form)
                assert refused.status in (401, 413) and "set-cookie" not in refused.headers
            signed = await post(rig, "sign-in", "token=s3cret%26%2B")
            assert signed.status == 200 and signed.headers["cache-control"] == "no-store"
            cookie, *attributes = signed.headers["set-cookie"].split("; ")
            assert attributes == ["Path=/-", "Max-Age=43200", "HttpOnly", "SameSite=Strict"]
            assert "s3cret" not in cookie
            for path in ("/-/status", "/-/metrics", "/-/"):
                assert (await rig.get(path, f"Cookie: other=1; {cookie}; more=2")).status == 200, path
            value = cookie.partition("=")[2]
            body, _, signature = value.rpartition(".")
            forged = [value[:-1], f"9{body}.{signature}", f".{signature}", "", "..", body, "\u00e9.a.b"]
            for wrong in forged:
                assert (await rig.get("/-/status", f"Cookie: quickthaw_session={wrong}")).status == 401, wrong
            behind_tls = await post(rig, "sign-in", "token=s3cret%26%2B", "X-Forwarded-Proto: https")
            assert behind_tls.headers["set-cookie"].endswith("; Secure")
            async with proxy(Settings(admin_token="s3cret&+")) as other:
                assert (await other.get("/-/status", f"Cookie: {cookie}")).status == 401, "of another proxy"
            gone = await post(rig, "sign-out", "", f"Cookie: {cookie}")
            assert gone.status == 200 and "Max-Age=0" in gone.headers["set-cookie"]
            assert (await rig.get("/-/status", f"Cookie: {cookie}")).status == 401
            assert (await rig.get("/-/sign-in", BEARER + "&+")).status == 404, "only POST signs in"
            assert not up.seen

    run(main())


def test_a_session_expires(monkeypatch):
    async def main():
        async with proxy(Settings(admin_token="s3cret")) as rig:
            cookie = (await post(rig, "sign-in", "token=s3cret")).headers["set-cookie"].partition(";")[0]
            now = time.time()
            for later, status in ((SESSION_S - 60, 200), (SESSION_S + 1, 401)):
                monkeypatch.setattr("plugin.proxy.admin.access.time.time", lambda later=later: now + later)
                assert (await rig.get("/-/status", f"Cookie: {cookie}")).status == status

    run(main())


def test_wrong_tokens_are_limited_per_address():
    async def main():
        async with proxy(Settings(admin_token="s3cret")) as rig:
            signed = (await post(rig, "sign-in", "token=s3cret")).headers["set-cookie"].partition(";")[0]
            statuses = [(await post(rig, "sign-in", "token=wrong")).status for _ in range(5)]
            statuses += [(await rig.get("/-/status", "Authorization: Bearer wrong")).status for _ in range(7)]
            assert statuses == [401] * 9 + [429] * 3
            refused = await post(rig, "sign-in", "token=s3cret")
            assert refused.status == 429 and refused.json()["error"]["code"] == "admin-throttled"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert (await rig.get("/-/status", BEARER)).status == 429, "guessing gets no answer for a minute"
            assert (await rig.get("/-/status", f"Cookie: {signed}")).status == 200, "existing sessions stay valid"
            assert (await post(rig, "sign-in", "token=s3cret", source="127.0.0.2")).status == 200
            assert (await rig.get("/-/ready")).status in (200, 503)

    run(main())


def test_an_unauthorised_browser_gets_the_page_without_data():
    async def main():
        html = "Accept: text/html,*/*"
        async with upstream() as up, proxy(Settings(admin_token="s3cret")) as rig:
            rig.add("a-name", up.port)
            page = await rig.get("/-/", html)
            assert page.status == 401 and b"Admin token" in page.body and b"a-name" not in page.body
            assert (await rig.get("/-/status", html)).json()["error"]["code"] == "admin-token"
        async with proxy() as rig:
            page = await rig.get("/-/", html, THROUGH_A_PROXY[0])
            assert page.status == 403 and page.body.startswith(b"<!doctype html>")
            assert (await post(rig, "sign-in", "token=x")).status == 405, "there is no token to sign in with"

    run(main())


def test_a_token_in_a_url_is_ignored_and_not_logged(caplog):
    async def main():
        async with proxy(Settings(admin_token="s3cret", access_log=True)) as rig:
            for path in ("/-/?token=s3cret", "/-/status?token=s3cret", "/-/metrics?token=s3cret"):
                assert (await rig.get(path)).status == 401
            assert (await rig.get("/x?token=s3cret", "Prefer: wait=0")).status == 503

    with caplog.at_level("DEBUG", "quickthaw.proxy"):
        run(main())
    assert "/-/status" in caplog.text and "s3cret" not in caplog.text
    assert "s3cret" not in str([vars(record) for record in caplog.records])


def test_the_admin_port_answers_every_client():
    async def main():
        address = a_host_address()
        async with everywhere(Settings(admin_on_public_port=False), own=True) as rig:
            assert (await get(address, rig.port, "/-/status", host=address)).status == 200
        async with everywhere(Settings(admin_on_public_port=False, admin_token="s3cret"), own=True) as rig:
            assert (await get(address, rig.port, "/-/status", host=address)).status == 401

    run(main())


def test_an_engines_last_lines_reach_the_log_and_admin_pages_only(caplog):
    died = EngineDied(
        "engine-died", "the engine exited with code 3 before it served", 3, "hf_token=secret in /srv/app.py"
    )

    async def main():
        async def wake() -> None:
            raise died

        async with proxy(wake=wake) as rig:
            rig.add("a", 1, phase=Phase.ASLEEP)
            refused = await rig.get("/v1/x")
            assert refused.status == 503 and refused.json()["error"]["code"] == "engine-died"
            assert "code 3" in refused.json()["error"]["message"] and "secret" not in refused.body.decode()
            rig.pool.start_failed(died)
            again = await rig.get("/v1/messages")
            assert again.json()["error"]["code"] == "engine-died" and "secret" not in again.body.decode()
            failure = (await rig.get("/-/status")).json()["pools"][0]["last_failure"]
            assert failure["code"] == "engine-died" and "hf_token=secret" in failure["message"]

    run(main())
    assert "hf_token=secret" in caplog.text


def test_ready_means_accepted_and_strict_means_served():
    async def main():
        async with upstream() as up, proxy(Settings(max_held=1)) as rig:

            async def ready() -> tuple[int, int, int]:
                paths = ("/-/live", "/-/ready", "/-/ready?strict=1")
                one, two, three = [(await rig.get(path)).status for path in paths]
                assert (await rig.get("/-/ready?strict")).status == three
                assert (await rig.get("/-/ready?strict=0")).status == two
                return one, two, three

            rig.add("a", up.port, phase=Phase.IDLE)
            assert await ready() == (200, 200, 503), "it starts: a request waits"
            waiting = asyncio.create_task(rig.get("/x"))
            await until(lambda: rig.pool.held == 1)
            assert await ready() == (200, 503, 503), "no more may wait"
            rig.restore("a")
            await waiting
            assert await ready() == (200, 200, 200)
            rig.trackers["a"].to(Phase.ASLEEP)
            await until(lambda: rig.pool.replicas["a"].tracker.phase is Phase.ASLEEP)
            assert await ready() == (200, 200, 503), "a request wakes it"
            rig.trackers["a"].to(Phase.FAILED, "x")
            rig.pool.start_failed(StartFailed("engine-died", "it ended"))
            assert await ready() == (200, 503, 503), "a request is refused"
            rig.restore("a")
            await until(lambda: rig.pool.try_acquire() is not None)
            rig.pool.release(rig.pool.replicas["a"])
            assert await ready() == (200, 200, 200)

    run(main())


@pytest.mark.slow
def test_ready_returns_when_the_next_request_would_wake_again():
    async def main():
        async def wake() -> None:
            raise StartFailed("wake-command-failed", "no")

        async with proxy(wake=wake) as rig:
            rig.add("a", 1, phase=Phase.ASLEEP)
            assert (await rig.get("/-/ready")).status == 200
            assert (await rig.get("/x")).status == 503
            assert (await rig.get("/-/ready")).status == 503, "a request now is refused at once"
            async with asyncio.timeout(20):
                while (await rig.get("/-/ready")).status != 200:  # noqa: ASYNC110 - asked from outside
                    await asyncio.sleep(0.05)
            assert (await rig.get("/x")).status == 503 and rig.pool.waker.wakes == 2

    run(main())


@pytest.mark.slow
def test_the_upstream_timeout_is_the_pools():
    async def slow(up, seen, reader, writer) -> bool:
        await asyncio.sleep(0.6)
        writer.write(answer())
        return True

    async def main():
        async with upstream(slow) as up, proxy(Settings(upstream_timeout_s=0.2)) as rig:
            rig.add("a", up.port)
            late = await rig.get("/x")
            assert late.status == 504 and late.json()["error"]["code"] == "upstream-timeout"
            assert "--upstream-timeout" in late.json()["error"]["message"]
            rig.pool.upstream_timeout_s = float("inf")
            assert (await rig.get("/x")).status == 200
        async with upstream(slow) as up, proxy(Settings(upstream_timeout_s=float("inf"))) as rig:
            rig.add("a", up.port)
            assert (await rig.get("/x")).status == 200
            assert json.loads(json.dumps(float("inf"))) == float("inf"), "so it reaches worker processes"

    run(main())
