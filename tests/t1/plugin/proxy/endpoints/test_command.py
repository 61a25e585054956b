"""`quickthaw proxy` as a process in front of one endpoint: wake and sleep commands and hooks, several workers, bad options."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launchers.bare import free_port
from tests.kits.proxy.commands import ENGINE, LIMIT_S, alive, call, command, engine, eventually, refused
from tests.kits.proxy.rig import Seen, Upstream, run, upstream

pytestmark = pytest.mark.t1


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_request_wakes_an_engine_once_and_again_after_its_sleep(workers):
    port = free_port()
    arguments = [
        "--upstream",
        f"http://127.0.0.1:{port}",
        "--wake",
        engine(port),
        "--ready-model",
        "m",
        "--workers",
        workers,
    ]
    with command(*arguments, "--sleep-after", "0.5") as (_, url):
        with ThreadPoolExecutor(12) as pool:
            got = list(pool.map(lambda n: call(f"{url}/v1/x?{n}", {"n": n}), range(12)))
        assert {status for status, _ in got} == {200}
        pids = {body["pid"] for _, body in got}
        assert len(pids) == 1, "one wake for all"
        _, status = call(f"{url}/-/status")
        assert status["outcomes"]["forwarded"] == 12 and status["pools"][0]["wakes"] == 1
        assert status["pools"][0]["replicas"][0]["served"] == 12
        eventually(lambda: not alive(*pids), "the idle engine is stopped")
        again = 0
        while True:  # on a busy machine it may be asleep again before its metrics are read
            code, body = call(f"{url}/v1/again", {})
            again += 1
            assert code == 200 and body["pid"] not in pids
            last = body["pid"]
            with urllib.request.urlopen(f"{url}/-/metrics", timeout=LIMIT_S) as answer:
                text = answer.read().decode()
            from prometheus_client.parser import text_string_to_metric_families

            samples = {
                (sample.name, tuple(sorted(sample.labels.values()))): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            if samples["quickthaw_proxy_replica_phase", ("default", "default", "serving")]:
                break
            eventually(lambda: not alive(last), "the idle engine is stopped again")  # noqa: B023 - called at once
        assert samples["quickthaw_proxy_requests_total", ("forwarded",)] == 12 + again
        assert samples["quickthaw_proxy_wakes_total", ("default",)] == 1 + again
        assert samples["quickthaw_proxy_sleeps_total", ("default",)] == again
        assert samples["quickthaw_proxy_first_byte_seconds_count", ()] == 12 + again
    eventually(lambda: not alive(last), "the engine ends with the proxy that started it")


@pytest.mark.slow
def test_dead_workers_are_replaced_the_port_stays_open_and_no_counter_goes_back(tmp_path):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--workers", "2"]
    with command(*arguments) as (process, url):
        assert call(f"{url}/v1/x", {})[0] == 200
        children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        workers = [p for p in children if b"plugin.proxy.workers.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(workers) == 2
        finished = call(f"{url}/-/status")[1]["finished"]
        assert sum(finished.values()) == 1
        for pid in workers:
            os.kill(pid, signal.SIGKILL)

        def answered() -> bool:
            with contextlib.suppress(OSError):
                return call(f"{url}/-/status")[1]["workers"] == 2
            return False

        eventually(lambda: not any(map(alive, workers)) and answered(), "the workers are replaced")
        assert call(f"{url}/-/status")[1]["finished"] == finished
        assert {call(f"{url}/v1/{n}", {})[0] for n in range(10)} == {200}


def test_a_failed_wake_command_is_named_in_the_answer():
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}", "--wake", "exit 7") as (_, url):
        status, body = call(f"{url}/v1/chat/completions", {})
        assert status == 503 and body["error"]["code"] == "wake-command-failed" and "7" in body["error"]["message"]


def test_an_engine_that_dies_is_woken_again():
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port)) as (_, url):
        first = call(f"{url}/v1/x", {})[1]["pid"]
        os.kill(first, signal.SIGKILL)

        eventually(lambda: refused(port), "the engine is gone")
        status, body = call(f"{url}/v1/y", {})
        assert status == 200 and body["pid"] != first


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_interrupt_ends_it_at_once_with_its_engine(workers):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--workers", workers]
    with command(*arguments, code=1) as (p, url):
        children = [int(n) for n in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()]
        pid = call(f"{url}/v1/x", {})[1]["pid"]
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as busy:
            busy.sendall(b"POST /v1/x HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nab")
            eventually(lambda: call(f"{url}/-/status")[1]["pools"][0]["outstanding"] == 1, "in flight")
            p.send_signal(signal.SIGINT)
            eventually(lambda: refused(int(url.rsplit(":", 1)[1])), "it no longer accepts")
            assert p.poll() is None, "it waits for requests in flight"
            p.send_signal(signal.SIGINT)
            assert p.wait(LIMIT_S) == 1
        eventually(lambda: not any(alive(n) for n in (pid, *children)), "the engine and the workers end with it")


def test_an_endpoint_without_a_wake_is_waited_for():
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}") as (_, url), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, f"{url}/v1/x", {})
        eventually(lambda: call(f"{url}/-/status")[1]["pools"][0]["held"] == 1, "held")
        other = subprocess.Popen([sys.executable, "-S", str(ENGINE), str(port)])
        try:
            assert waiting.result(LIMIT_S)[0] == 200
        finally:
            other.terminate()
            other.wait(LIMIT_S)


def test_url_hooks_wake_and_put_to_sleep():
    async def main():
        calls = []

        async def hooked(up: Upstream, seen: Seen, reader, writer) -> bool:
            calls.append((seen.method, seen.target))
            awake = [c for c in calls if c[0] == "POST"][-1:] == [("POST", "/wake")]
            ok = seen.target in ("/wake", "/sleep") or awake
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\n{}" % (b"200 OK" if ok else b"503 Asleep"))
            return True

        async with upstream(hooked) as up:
            base = f"http://127.0.0.1:{up.port}"
            arguments = ["--upstream", base, "--wake-url", f"{base}/wake", "--sleep-url", f"{base}/sleep"]

            def use() -> None:
                with command(*arguments, "--sleep-after", "0.2", "--deny", "/wake", "--deny", "/sleep") as (_, url):
                    assert call(f"{url}/v1/x")[0] == 200
                    eventually(lambda: ("POST", "/sleep") in calls, "put to sleep")
                    eventually(
                        lambda: call(f"{url}/-/status")[1]["pools"][0]["replicas"][0]["phase"] == "asleep", "asleep"
                    )
                    assert call(f"{url}/v1/x")[0] == 200
                    assert call(f"{url}/sleep", b"")[0] == 404
                    assert calls.count(("POST", "/wake")) == 2

            await asyncio.to_thread(use)

    run(main())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --upstream or --config"),
        (["--upstream", "http://127.0.0.1:1", "--listen", "nowhere"], "HOST:PORT"),
        (["--upstream", "http://127.0.0.1:1", "--admin-prefix", "x"], "--admin-prefix"),
        (["--upstream", "ftp://x", "--listen", "127.0.0.1:0"], "upstream"),
        (["--upstream", "http://127.0.0.1:1", "--admin-token", " "], "the token is empty"),
        (["--upstream", "http://127.0.0.1:1", "--upstream-timeout", "soon"], "90s, 10m or 24h"),
        (["--upstream", "http://127.0.0.1:1", "--deny", "/"], "cannot deny '/'"),
        (["--upstream", "http://127.0.0.1:1", "--deny", ""], "cannot deny ''"),
        (["--upstream", "http://127.0.0.1:1", "--wake-url", "scaler/up", "--listen", "127.0.0.1:0"], "http"),
        (["--upstream", "http://127.0.0.1:1", "--admin-listen", "nowhere", "--listen", "127.0.0.1:0"], "HOST:PORT"),
        (["--upstream", "http://127.0.0.1:47113", "--listen", "127.0.0.1:47113"], "where this proxy itself listens"),
        (["--upstream", "http://localhost:47113", "--listen", "0.0.0.0:47113"], "where this proxy itself listens"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, said):
    from click.testing import CliRunner

    from plugin.proxy.cli import proxy as entry

    result = CliRunner().invoke(entry, arguments)
    assert result.exit_code == 2 and said in result.output


def test_a_port_in_use_is_reported_in_one_line():
    from click.testing import CliRunner

    from plugin.proxy.cli import proxy as entry

    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--upstream", "http://127.0.0.1:1", "--listen", f"127.0.0.1:{taken.getsockname()[1]}"]
        result = CliRunner().invoke(entry, arguments)
    assert (
        result.exit_code == 1 and "port-in-use: " in result.output and "another process listens there" in result.output
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_an_engine_without_requests_is_detected_when_it_starts_and_ends(workers):
    """As a load balancer sees it that sends nothing while `/-/ready` is negative."""
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}", "--workers", workers) as (_, url):
        assert call(f"{url}/-/live")[0] == 200 and call(f"{url}/-/ready")[0] == 200
        assert call(f"{url}/-/ready?strict=1")[0] == 503
        with subprocess.Popen([sys.executable, "-S", str(ENGINE), str(port)]) as process:
            eventually(lambda: call(f"{url}/-/ready?strict=1")[0] == 200, "it has come")
            process.kill()
        eventually(lambda: call(f"{url}/-/ready?strict=1")[0] == 503, "it has gone")
        assert call(f"{url}/-/ready")[0] == 200


@pytest.mark.slow
def test_a_failed_wake_is_retried_for_the_workers_requests(tmp_path):
    port, able = free_port(), tmp_path / "able"
    wake = f"test -e {able} && {engine(port)}"
    with command("--upstream", f"http://127.0.0.1:{port}", "--wake", wake, "--workers", "2") as (_, url):
        assert call(f"{url}/v1/x", {})[1]["error"]["code"] == "wake-command-failed"
        able.touch()
        eventually(lambda: call(f"{url}/v1/x", {})[0] == 200, "after a pause the next request wakes it")


def test_the_admin_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("QUICKTHAW_ADMIN_TOKEN", "s3cret")
    with command("--upstream", f"http://127.0.0.1:{free_port()}") as (_, url):
        assert call(f"{url}/-/status")[1]["error"]["code"] == "admin-token"
        assert call(f"{url}/-/status", Authorization="Bearer s3cret")[0] == 200
        assert call(f"{url}/-/ready")[0] == 200


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_admin_endpoints_can_have_their_own_port(workers):
    own, port = free_port(), free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{own}", "--workers", workers]
    with command(*arguments, "--admin-prefix", "/quick/thaw") as (_, url):
        assert call(f"http://127.0.0.1:{own}/quick/thaw/status")[0] == 200
        assert call(f"{url}/quick/thaw/status")[0] == 404
        assert call(f"http://127.0.0.1:{own}/v1/models")[0] == 404, "the engine is not reached through it"


@pytest.mark.slow
def test_a_supervisor_that_hangs_is_named_and_requests_are_still_answered():
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--workers", "2"]
    with command(*arguments) as (process, url):
        assert call(f"{url}/v1/x")[0] == 200
        process.send_signal(signal.SIGSTOP)
        try:
            status, answer = call(f"{url}/-/status")
            assert (status, answer["error"]["code"]) == (503, "supervisor-silent")
            assert call(f"{url}/v1/x")[0] == 200
        finally:
            process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_session_is_valid_and_ends_in_every_worker():
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}", "--admin-token", "s3cret", "--workers", "3") as (_, url):

        def of_24_connections(cookie: str) -> set[int]:
            """Return the answers to 24 connections, which the kernel spreads over the workers."""
            return {call(f"{url}/-/status", Cookie=cookie)[0] for _ in range(24)}

        asked = urllib.request.Request(f"{url}/-/sign-in", b"token=s3cret")
        with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
            cookie = answer.headers["set-cookie"].partition(";")[0]
        assert of_24_connections(cookie) == {200} and of_24_connections("") == {401}
        found = call(f"{url}/-/status", Cookie=cookie)[1]
        assert found["listens_at"] == url and found["workers"] == 3
        assert call(f"{url}/-/sign-out", {}, Cookie=cookie)[0] == 200
        limit = time.monotonic() + LIMIT_S
        while of_24_connections(cookie) != {401}:
            assert time.monotonic() < limit


@pytest.mark.slow
def test_the_admin_prefix_and_json_logs(tmp_path):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--admin-prefix", "/admin"]
    with command(*arguments, "--admin-token", "s3cret", kept=(kept := [])) as (_, url):
        assert call(f"{url}/v1/x", {}, **{"X-Request-Id": "mine-1"})[0] == 200
        assert call(f"{url}/-/status")[1]["path"] == "/-/status", "no longer an admin path: the engine answers"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/admin/status", timeout=LIMIT_S)
        assert refused.value.code == 401 and refused.value.headers["www-authenticate"].startswith("Bearer")
        refused.value.close()
        assert call(f"{url}/admin/status", Authorization="bearer s3cret")[0] == 200
        asked = urllib.request.Request(f"{url}/admin/", headers={"Authorization": "Bearer s3cret"})
        with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
            assert '"/admin/status"' in answer.read().decode()
    lines = [json.loads(line) for line in "".join(kept).splitlines()]
    held = next(line for line in lines if line["event"] == "request" and line["request_id"] == "mine-1")
    assert held["held_s"] > 0 and held["first_byte_s"] >= held["held_s"] and held["outcome"] == "forwarded"
    started = next(line for line in lines if line["event"] == "started")
    assert started["phases"]["starting"] > 0 and started["kind"] == "cold"
    assert {(line["from"], line["to"]) for line in lines if line["event"] == "phase"} >= {
        ("asleep", "mounting"),
        ("warming", "serving"),
    }
    assert "s3cret" not in "".join(kept)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_probes_neither_keep_an_engine_awake_nor_wake_it(workers):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--workers", workers]
    with command(*arguments, "--sleep-after", "0.5") as (_, url):
        pid = call(f"{url}/v1/x", {})[1]["pid"]

        def probed_to_sleep() -> bool:
            assert call(f"{url}/health")[0] == 200 and call(f"{url}/metrics")[0] in (200, 503)
            return not alive(pid)

        eventually(probed_to_sleep, "the probed engine is stopped")
        for _ in range(4):  # of either worker
            assert call(f"{url}/health")[0] == 200
            status, body = call(f"{url}/favicon.ico")
            assert status == 404 and body["error"]["code"] == "engine-asleep"
        _, document = call(f"{url}/-/status")
        assert document["pools"][0]["wakes"] == 1 and document["pools"][0]["sleeps"] == 1
        assert call(f"{url}/v1/x", {})[0] == 200


@pytest.mark.slow
def test_wake_on_and_api_key_are_read_from_variables(monkeypatch):
    async def wants_key(up: Upstream, seen: Seen, reader, writer) -> bool:
        from tests.kits.proxy.rig import answer

        wrong = seen.target == "/v1/completions" and seen.header("authorization") != ["Bearer s3cret"]
        writer.write(answer(b'{"ok":true}', "401 Unauthorized" if wrong else "200 OK"))
        return True

    monkeypatch.setenv("QUICKTHAW_API_KEY", "s3cret")
    monkeypatch.setenv("QUICKTHAW_WAKE_ON", "/mine /favicon.ico")
    said: list[str] = []

    async def main():
        async with upstream(wants_key) as up:

            def client() -> None:
                base = f"http://127.0.0.1:{up.port}"
                with command("--upstream", base, "--ready-model", "m", "--log-level", "debug", kept=said) as (_, url):
                    assert call(f"{url}/mine/x")[0] == 200
                    assert call(f"{url}/-/ready?strict=1")[0] == 200
                    assert "s3cret" not in json.dumps(call(f"{url}/-/status")[1])

            await asyncio.to_thread(client)

    run(main())
    assert "s3cret" not in "".join(said)
