"""`quickthaw proxy` as a process: wake and sleep commands and hooks, several models, several workers, real clients."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launchers.bare import free_port
from plugin.runtime.phases import Phase
from tests.kits.proxy_rig import Seen, Upstream, proxy, run, until, upstream

pytestmark = pytest.mark.t1

ENGINE = Path(__file__).parents[3] / "programs" / "proxy_engine.py"
LIMIT_S = 60


@contextmanager
def command(
    *arguments: str, code: int = 0, kept: list[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `quickthaw proxy`; its URL. Ends it by SIGTERM unless it has ended, and expects `code`; what it said
    is added to `kept`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", "from plugin.proxy.cli import proxy; proxy()", "--listen", "127.0.0.1:0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
    )
    assert process.stderr is not None
    seen = [] if kept is None else kept
    try:
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"listening on (\S+)", line):
                break
        else:
            raise AssertionError("".join(seen))
        with ThreadPoolExecutor(1) as reader:
            log = reader.submit(process.stderr.read)
            try:
                yield process, found[1]
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                ended = process.wait(LIMIT_S)
                seen.append(log.result(LIMIT_S))
        assert ended == code, "".join(seen)[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


def call(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def alive(pid: int) -> bool:
    """True for a process that runs; a zombie waits only for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def eventually(condition: Any, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def engine(port: int, *more: str) -> str:
    return f"exec {sys.executable} -S {ENGINE} {port} " + " ".join(more)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_woken_by_a_request_once_put_to_sleep_and_woken_again(workers):
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
    with command(*arguments, "--idle-timeout", "0.5") as (_, url):
        with ThreadPoolExecutor(12) as pool:
            got = list(pool.map(lambda n: call(f"{url}/v1/x?{n}", {"n": n}), range(12)))
        assert {status for status, _ in got} == {200}
        pids = {body["pid"] for _, body in got}
        assert len(pids) == 1, "one wake for all"
        _, status = call(f"{url}/-/status")
        assert status["outcomes"]["forwarded"] == 12 and status["pools"][0]["wakes"] == 1
        assert status["pools"][0]["replicas"][0]["served"] == 12
        eventually(lambda: not alive(*pids), "the idle engine is stopped")
        code, body = call(f"{url}/v1/again", {})
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
        assert samples["quickthaw_proxy_requests_total", ("forwarded",)] == 13
        assert samples["quickthaw_proxy_wakes_total", ("default",)] == 2
        assert samples["quickthaw_proxy_sleeps_total", ("default",)] == 1
        assert samples["quickthaw_proxy_replica_phase", ("default", "default", "serving")] == 1
        assert samples["quickthaw_proxy_first_byte_seconds_count", ()] == 13
    eventually(lambda: not alive(last), "the engine ends with the proxy that started it")


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_port_goes_on(tmp_path):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--workers", "2"]
    with command(*arguments) as (process, url):
        assert call(f"{url}/v1/x", {})[0] == 200
        children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        workers = [p for p in children if b"plugin.proxy.workers.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)

        def answered() -> bool:
            with contextlib.suppress(OSError):
                return call(f"{url}/-/status")[1]["workers"] == 2
            return False

        eventually(answered, "the worker is replaced")
        assert {call(f"{url}/v1/{n}", {})[0] for n in range(10)} == {200}


def test_a_wake_command_that_fails_is_said_in_the_answer():
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}", "--wake", "exit 7") as (_, url):
        status, body = call(f"{url}/v1/chat/completions", {})
        assert status == 503 and body["error"]["code"] == "wake-command-failed" and "7" in body["error"]["message"]


def test_an_engine_that_dies_is_woken_anew():
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
            assert p.poll() is None, "it waits for what is in flight"
            p.send_signal(signal.SIGINT)
            assert p.wait(LIMIT_S) == 1
        eventually(lambda: not any(alive(n) for n in (pid, *children)), "the engine and the workers end with it")


def test_an_endpoint_of_somebody_elses_is_only_waited_for():
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


def test_hooks_by_url_wake_and_put_to_sleep():
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
                with command(*arguments, "--idle-timeout", "0.2", "--deny", "/wake", "--deny", "/sleep") as (_, url):
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


def models_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return str(path)


def test_several_models_take_turns_in_the_one_place_there_is(tmp_path):
    config = models_file(
        tmp_path,
        f"""
max_awake: 1
min_awake: 0
models:
  red:   {{command: "{engine("${PORT}", "red")}", aliases: [crimson]}}
  green: {{command: "{engine("${PORT}", "green")}"}}
  blue:  {{command: "{engine("${PORT}", "blue")}", served_name: org/blue-7b}}
""",
    )
    with command("--config", config) as (_, url):
        listed = call(f"{url}/v1/models")[1]
        assert [m["id"] for m in listed["data"]] == ["red", "green", "blue"]
        order = ["red", "green", "blue", "crimson", "red", "green"]
        with ThreadPoolExecutor(6) as pool:
            got = list(
                pool.map(lambda name: call(f"{url}/v1/chat/completions", {"messages": [], "model": name}), order)
            )
        assert [body["name"] for _, body in got] == ["red", "green", "blue", "red", "red", "green"]
        phases = [m["phase"] for m in call(f"{url}/v1/models")[1]["data"]]
        assert phases.count("serving") == 1 and phases.count("asleep") == 2
        assert call(f"{url}/v1/models/crimson")[1]["id"] == "red" and call(f"{url}/v1/models/pink")[0] == 404
        assert call(f"{url}/v1/x", {"model": "pink"})[1]["error"]["code"] == "model-not-found"
        assert call(f"{url}/v1/x", {})[1]["error"]["code"] == "model-missing"
        assert call(f"{url}/v1/x?model=blue")[1]["name"] == "blue"
        squeezed = gzip.compress(json.dumps({"model": "blue"}).encode())
        renamed = '{"model":"org/blue-7b"}'
        got = call(f"{url}/v1/x", squeezed, **{"Content-Encoding": "gzip", "X-Echo": "1"})
        assert got[1]["name"] == "blue" and got[1]["body"] == renamed, "named as its engine knows it"
        text = b'{"seed": 12345678901234567890, "x": {"model": "a"}, "model": "blue", "t": 1.10}'
        got = call(f"{url}/v1/x", text, **{"X-Echo": "1"})
        assert got[1]["body"] == '{"seed":12345678901234567890,"x":{"model": "a"},"model":"org/blue-7b","t":1.10}'
        squeezed = gzip.compress(json.dumps({"model": "green"}).encode())
        got = call(f"{url}/v1/x", squeezed, **{"Content-Encoding": "gzip"})
        assert got[1]["name"] == "green" and got[1]["length"] == len(squeezed), "what is sent on stays as it came"
        assert call(f"{url}/v1/x", b"no gzip", **{"Content-Encoding": "gzip"})[1]["error"]["code"] == "content-encoding"
        form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nblue\r\n--b--\r\n'
        got = call(f"{url}/v1/audio/transcriptions", form, **{"Content-Type": "multipart/form-data; boundary=b"})
        assert got[1]["name"] == "blue"


@pytest.mark.slow
def test_the_lowest_priority_sleeps_first(tmp_path):
    config = models_file(
        tmp_path,
        f"""
max_awake: 2
min_awake: 0
evict: priority
models:
  pet:    {{command: "{engine("${PORT}", "pet")}", priority: 9}}
  cattle: {{command: "{engine("${PORT}", "cattle")}"}}
  third:  {{command: "{engine("${PORT}", "third")}"}}
""",
    )
    with command("--config", config, "--workers", "2") as (_, url):
        for name in ("pet", "cattle", "third"):
            assert call(f"{url}/v1/x", {"model": name})[1]["name"] == name

        def phases() -> dict[str, str]:
            return {m["id"]: m["phase"] for m in call(f"{url}/v1/models")[1]["data"]}

        expected = {"pet": "serving", "cattle": "asleep", "third": "serving"}
        eventually(lambda: phases() == expected, f"{phases()}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {}", "names no model"),
        ("models: {a: {}}", "exactly one of"),
        ("models: {a: {upstream: 'http://x', command: y}}", "exactly one of"),
        ("models: {a: {upstream: 'http://x', typo: 1}}", "typo"),
        ("models: {a: {upstream: 'http://x'}}\nmax_awake: 1", "needs `sleep`"),
        ("models: {a: {command: x}, b: {command: x, aliases: [a]}}", "names both"),
        ("models: {a: {command: x}}\ndefault: b", "default"),
        ("models: {a: {command: x}}\nevict: never", "evict"),
        ("models: {a: {upstream: 'ftp://x'}}", "upstream"),
        ("models: [", "not YAML"),
        ("models: {a: {command: x}}\nidle_timeout: soon", "90s, 10m or 1h"),
        ("models: {a: {command: x, upstream_timeout: -1}}", "negative"),
        ("models: {a: {command: x, wake_timeout: true}}", "expected a time"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, said):
    from click.testing import CliRunner

    from plugin.proxy.cli import proxy as entry

    result = CliRunner().invoke(entry, ["--config", models_file(tmp_path, text), "--listen", "127.0.0.1:0"])
    assert result.exit_code == 2 and said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --upstream or --config"),
        (["--upstream", "http://127.0.0.1:1", "--listen", "nowhere"], "HOST:PORT"),
        (["--upstream", "http://127.0.0.1:1", "--admin-prefix", "x"], "--admin-prefix"),
        (["--upstream", "ftp://x", "--listen", "127.0.0.1:0"], "upstream"),
        (["--upstream", "http://127.0.0.1:1", "--admin-token", " "], "the token is empty"),
        (["--upstream", "http://127.0.0.1:1", "--upstream-timeout", "soon"], "90s, 10m or 1h"),
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


def test_a_port_in_use_is_one_line():
    from click.testing import CliRunner

    from plugin.proxy.cli import proxy as entry

    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--upstream", "http://127.0.0.1:1", "--listen", f"127.0.0.1:{taken.getsockname()[1]}"]
        result = CliRunner().invoke(entry, arguments)
    assert (
        result.exit_code == 1 and "port-in-use: " in result.output and "another process listens there" in result.output
    )


def test_how_long_an_answer_may_take_is_set_for_all_and_for_each_model(tmp_path):
    from plugin.options import Limit, Seconds
    from plugin.proxy.endpoints.models import ModelRouter, load
    from plugin.proxy.pool.pool import ReplicaPool

    limits = {"a": ReplicaPool(), "b": ReplicaPool(), "c": ReplicaPool()}
    text = "models: {a: {command: x, upstream_timeout: 90}, b: {command: x}, "
    config = load(Path(models_file(tmp_path, text + "c: {command: x, upstream_timeout: none, wake_timeout: 1.5m}}")))
    ModelRouter(config, limits)
    assert [pool.upstream_timeout_s for pool in limits.values()] == [90.0, None, float("inf")]
    assert config.models["c"].wake_timeout == 90.0
    plain = load(Path(models_file(tmp_path, "models: {a: {command: x}}")))
    ModelRouter(plain, fresh := {"a": ReplicaPool()})
    assert fresh["a"].upstream_timeout_s is None, "as the command says"
    for text, value in (("0", float("inf")), ("none", float("inf")), ("1h", 3600.0), ("90", 90.0)):
        assert Limit().convert(text, None, None) == value
    assert Seconds().convert("0", None, None) == 0.0


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_an_engine_that_nobody_asks_for_is_noticed_when_it_comes_and_when_it_goes(workers):
    """From outside: issue 21's balancer, which sends nothing while `/-/ready` says no."""
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
def test_a_wake_that_failed_once_is_tried_again_for_the_workers_requests(tmp_path):
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
def test_own_pages_on_a_port_of_their_own(workers):
    own, port = free_port(), free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{own}", "--workers", workers]
    with command(*arguments, "--admin-prefix", "/quick/thaw") as (_, url):
        assert call(f"http://127.0.0.1:{own}/quick/thaw/status")[0] == 200
        assert call(f"{url}/quick/thaw/status")[0] == 404
        assert call(f"http://127.0.0.1:{own}/v1/models")[0] == 404, "the engine is not reached through it"


@pytest.mark.slow
def test_a_session_holds_in_every_worker_and_ends_in_every_worker():
    port = free_port()
    with command("--upstream", f"http://127.0.0.1:{port}", "--admin-token", "s3cret", "--workers", "3") as (_, url):

        def everywhere(cookie: str) -> set[int]:
            """What 24 connections get, which the kernel spreads over the workers."""
            return {call(f"{url}/-/status", Cookie=cookie)[0] for _ in range(24)}

        asked = urllib.request.Request(f"{url}/-/sign-in", b"token=s3cret")
        with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
            cookie = answer.headers["set-cookie"].partition(";")[0]
        assert everywhere(cookie) == {200} and everywhere("") == {401}
        found = call(f"{url}/-/status", Cookie=cookie)[1]
        assert found["listens_at"] == url and found["workers"] == 3
        assert call(f"{url}/-/sign-out", {}, Cookie=cookie)[0] == 200
        limit = time.monotonic() + LIMIT_S
        while everywhere(cookie) != {401}:
            assert time.monotonic() < limit


@pytest.mark.slow
def test_own_pages_moved_and_the_log_read_by_a_machine(tmp_path):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--admin-prefix", "/admin"]
    with command(*arguments, "--admin-token", "s3cret", kept=(kept := [])) as (_, url):
        assert call(f"{url}/v1/x", {}, **{"X-Request-Id": "mine-1"})[0] == 200
        assert call(f"{url}/-/status")[1]["path"] == "/-/status", "no longer the proxy's: the engine answers"
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


def chat(up: Upstream, seen: Seen) -> bytes:
    body = json.loads(seen.body)
    base = {"id": "c1", "created": 1, "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": "hello there"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        data = json.dumps(base | {"object": "chat.completion", "choices": [choice]}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
    out = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    for word in ("hello", " there"):
        choice = {"index": 0, "delta": {"content": word}}
        event = b"data: %b\n\n" % json.dumps(base | {"object": "chat.completion.chunk", "choices": [choice]}).encode()
        out += b"%x\r\n%b\r\n" % (len(event), event)
    event = b"data: [DONE]\n\n"
    return out + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("retries", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_openai_client_waits_and_gets_its_answer(early, retries):
    openai = pytest.importorskip("openai")
    from plugin.proxy.settings import Settings

    async def talk(up: Upstream, seen: Seen, reader, writer) -> bool:
        writer.write(chat(up, seen))
        return True

    async def main():
        async with upstream(talk) as up, proxy(Settings(early_stream=early, early_comment_every_s=0.02)) as rig:
            rig.add("a", up.port, phase=Phase.IDLE)
            messages = [{"role": "user", "content": "hi"}]
            async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="k", max_retries=retries) as client:
                whole = asyncio.create_task(client.chat.completions.create(model="m", messages=messages))

                async def streamed() -> str:
                    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
                    return "".join([event.choices[0].delta.content or "" async for event in stream])

                parts = asyncio.create_task(streamed())
                await until(lambda: rig.pool.held == 2)
                await asyncio.sleep(0.1)
                rig.restore("a")
                assert (await whole).choices[0].message.content == "hello there"
                assert await parts == "hello there"
                assert len(up.seen) == 2, "each was sent once"

                # a start that has finally failed is an APIStatusError (or, in a stream that was begun early, an
                # APIError)
                rig.trackers["a"].to(Phase.FAILED, "gone")
                from plugin.proxy.errors import StartFailed

                rig.pool.start_failed(StartFailed("engine-died", "the engine ended", retry_after_s=0.1))
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(model="m", messages=messages)
                assert caught.value.status_code == 503 and caught.value.code == "engine-died"
                assert rig.server.stats.outcomes["engine-died"] == retries + 1

    run(main())


def test_the_openai_client_reads_an_early_streams_error():
    openai = pytest.importorskip("openai")
    from plugin.proxy.errors import StartFailed
    from plugin.proxy.settings import Settings

    async def main():
        async with (
            proxy(Settings(early_stream=True)) as rig,
            openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="k", max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            await until(lambda: rig.pool.held == 1)
            rig.pool.start_failed(StartFailed("engine-died", "the engine ended"))
            with pytest.raises(openai.APIError, match="the engine ended") as caught:
                async for _ in stream:
                    pass
            assert caught.value.code == "engine-died"

    run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl():
    async def main():
        async with upstream() as up, proxy() as rig:
            rig.add("a", up.port)

            async def curl(*arguments: str) -> str:
                process = await asyncio.create_subprocess_exec(
                    "curl",
                    "-sS",
                    "-m",
                    "30",
                    *arguments,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )
                out, _ = await process.communicate()
                return out.decode()

            assert json.loads(await curl(f"{rig.url}/a"))["target"] == "/a"
            assert (
                json.loads(await curl(f"{rig.url}/b", "-d", "x" * 5000))["length"] == 5000
            )  # with Expect: 100-continue
            assert (
                json.loads(await curl(f"{rig.url}/b", "-H", "Transfer-Encoding: chunked", "-d", "abc"))["length"] == 3
            )
            assert (await curl("-N", f"{rig.url}/stream")).count("data: ") == 5
            assert "200 OK" in await curl("-I", f"{rig.url}/stream")
            assert json.loads(await curl("--http2", f"{rig.url}/c", "-d", "abc"))["length"] == 3
            assert json.loads(await curl("--http1.0", f"{rig.url}/c"))["target"] == "/c"
            # curl itself takes dots out of a path unless told not to
            assert "not-found" in await curl("--path-as-is", f"{rig.url}/x/../-/status")

    run(main())


def test_a_real_websocket_client_and_server():
    websockets = pytest.importorskip("websockets.asyncio.client")
    from websockets.asyncio.server import serve

    async def main():
        async def echo(connection):
            async for message in connection:
                await connection.send(message)

        async with serve(echo, "127.0.0.1", 0, max_size=None) as server, proxy() as rig:
            rig.add("a", server.sockets[0].getsockname()[1], phase=Phase.IDLE)
            asyncio.get_running_loop().call_later(0.1, rig.restore, "a")
            async with websockets.connect(f"ws://127.0.0.1:{rig.port}/v1/realtime?model=m", max_size=None) as client:
                for message in ("hello", b"\0\1", "x" * 3_000_000):
                    await client.send(message)
                    assert await client.recv() == message
            await until(lambda: rig.server.stats.outcomes["tunnel"] == 1)

    run(main())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_with_adapters_loaded_while_it_serves_keeps_its_place(tmp_path, workers):
    config = models_file(
        tmp_path,
        f"""
max_awake: 1
min_awake: 0
models:
  red:  {{command: "{engine("${PORT}", "red")}", idle_timeout: 0.3}}
  blue: {{command: "{engine("${PORT}", "blue")}"}}
""",
    )
    with command("--config", config, "--workers", workers) as (_, url):
        assert call(f"{url}/v1/load_lora_adapter?model=red", {"lora_name": "sql", "lora_path": "/l"})[0] == 200
        time.sleep(1.0)
        assert [m["phase"] for m in call(f"{url}/v1/models")[1]["data"]] == ["serving", "asleep"]
        status, answer = call(f"{url}/v1/x", {"model": "blue"})
        assert status == 503 and answer["error"]["code"] == "adapters-loaded"
        assert call(f"{url}/v1/x", {"model": "red"})[0] == 200


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("body", [b"{}", b"{"], ids=["left-before-the-refusal", "never-whole"])
def test_a_client_that_asks_for_adapters_in_vain_and_leaves_keeps_nothing_awake(tmp_path, workers, body):
    config = models_file(
        tmp_path,
        f"""
max_awake: 1
min_awake: 0
models:
  red:  {{command: "{engine("${PORT}", "red")}"}}
  blue: {{command: "{engine("${PORT}", "blue")}"}}
""",
    )
    with command("--config", config, "--workers", workers) as (_, url):
        assert call(f"{url}/v1/x", {"model": "red"})[0] == 200
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            head = b"POST /refuse/load_lora_adapter?model=red HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\n"
            client.sendall(head + body)
            time.sleep(0.15)
        status, answer = call(f"{url}/v1/x", {"model": "blue"})
        assert status == 200, answer


@pytest.mark.parametrize("workers", ["1", "2"])
def test_adapters_that_load_while_the_place_is_asked_for_keep_it(tmp_path, workers):
    config = models_file(
        tmp_path,
        f"""
max_awake: 1
min_awake: 0
models:
  red:  {{command: "{engine("${PORT}", "red")}"}}
  blue: {{command: "{engine("${PORT}", "blue")}"}}
""",
    )
    with command("--config", config, "--workers", workers) as (_, url), ThreadPoolExecutor(1) as pool:
        assert call(f"{url}/v1/x", {"model": "red"})[0] == 200
        load = pool.submit(call, f"{url}/slow/load_lora_adapter?model=red", {"lora_name": "sql"})
        time.sleep(0.1)
        status, answer = call(f"{url}/v1/x", {"model": "blue"})
        assert load.result()[0] == 200
        assert status == 503 and "adapters" in answer["error"]["message"], answer


SQUAT = """
import os, socket, sys
os.setuid(65534)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("up", flush=True)
while True:
    sock, _ = server.accept()
    print(sock.recv(65536), file=sys.stderr, flush=True)
    sock.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
    sock.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_at_a_models_port_gets_no_request_of_its_clients(tmp_path):
    ports = tmp_path / "port"
    wait = f"echo ${{PORT}} > {ports}; sleep 60"  # an engine that is still being imported
    config = models_file(tmp_path, f"""models: {{red: {{command: "{wait}", wake_timeout: 3}}}}""")
    with command("--config", config) as (_, url), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(call, f"{url}/v1/x", {"model": "red"}, Authorization="Bearer clients-key")
        limit = time.monotonic() + 20
        while not (ports.exists() and ports.read_text()) and time.monotonic() < limit:
            time.sleep(0.01)
        argv = [sys.executable, "-S", "-c", SQUAT, ports.read_text().strip()]
        with (tmp_path / "stolen").open("w") as stolen:
            thief = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stolen, text=True)
        try:
            assert thief.stdout.readline() == "up\n"
            status, answer = asked.result()
        finally:
            thief.kill()
            thief.communicate()
        assert "clients-key" not in (tmp_path / "stolen").read_text()
        assert status == 503 and "engine-port-taken" in answer["error"]["message"], answer
