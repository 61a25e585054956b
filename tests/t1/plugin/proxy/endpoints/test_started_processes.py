"""How `quickthaw proxy` ends: by SIGHUP, by kill -9 with another proxy afterwards, and one of several workers by SIGTERM."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launchers.bare import free_port
from plugin.proxy.endpoints.started_processes import Identity, Orphan, Started
from tests.kits.proxy.commands import ENGINE, alive, call, command, engine, eventually, models_file

pytestmark = pytest.mark.t1


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def killed(arguments: list[str], path: str = "/v1/x", body: dict[str, object] | None = None) -> int:
    """Start a proxy that wakes its engine, and kill it; return the engine's PID."""
    log = (Path(os.environ["QUICKTHAW_HOME"]).parent / "log").open("w+")
    argv = [sys.executable, "-c", "from plugin.proxy.cli import proxy; proxy()", *arguments]
    with log:
        port = free_port()
        process = subprocess.Popen(
            [*argv, "--listen", f"127.0.0.1:{port}"],
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[5])},
        )
        try:
            eventually(lambda: "listening on" in Path(log.name).read_text(), "it listens")
            status, answer = call(f"http://127.0.0.1:{port}{path}", body or {})
            assert status == 200
        finally:
            process.kill()
            process.wait()
    pid = int(answer["pid"])
    assert alive(pid), "it outlives the proxy"
    return pid


@contextlib.contextmanager
def gone_at_last(pid: int):
    try:
        yield
    finally:
        if alive(pid) and str(ENGINE).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_next_proxy_takes_over_the_engine_of_a_killed_one(home):
    port = free_port()
    arguments = ["--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port), "--sleep-after", "0.5"]
    pid = killed(arguments)
    said: list[str] = []
    with gone_at_last(pid):
        with command(*arguments, kept=said) as (_, url):
            assert call(f"{url}/v1/x", {})[1]["pid"] == pid
            eventually(lambda: not alive(pid), "the idle engine is stopped")
            eventually(lambda: not list(home.glob("run/proxy/*.json")), "its record goes with it")
            assert call(f"{url}/v1/x", {})[0] == 200
        assert f"taking over process {pid}" in "".join(said) and "did not go to sleep" not in "".join(said)
    assert not list(home.glob("run/proxy/*"))


@pytest.mark.slow
def test_an_engine_left_on_another_port_is_ended(tmp_path):
    text = f'models:\n  m: {{command: "exec {sys.executable} -S {ENGINE} ${{PORT}} m"}}\n'
    config = models_file(tmp_path, text)
    pid = killed(["--config", config], body={"model": "m"})
    with gone_at_last(pid), command("--config", config) as (_, url):
        assert not alive(pid), "before it listens"
        assert call(f"{url}/v1/x", {"model": "m"})[1]["pid"] != pid


def test_a_process_other_than_the_recorded_one_is_not_touched():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            mine = Identity.of(process.pid)
            assert mine is not None and mine.alive()
            dead = replace(Identity.of(os.getpid()), start=1)
            started = Started("key", "u")
            for wrong in (
                replace(mine, start=mine.start - 1),
                replace(mine, boot="another"),
                replace(mine, pid_namespace="pid:[1]"),
            ):
                assert not wrong.alive()
                with pytest.raises(ProcessLookupError):
                    Orphan(wrong)
                started.note(process.pid)
                (file,) = started._folder.glob("*.json")
                record = json.loads(file.read_text())
                record |= {"process": wrong.__dict__, "owner": dead.__dict__}
                file.write_text(json.dumps(record))
                assert started.orphans() == [] and not file.exists()
            started.note(process.pid)
            assert started.orphans() == [], "its proxy lives"
            assert list(started._folder.glob("*.json"))
        finally:
            process.kill()


def test_an_unwritable_or_unreadable_record_is_only_lost(home, caplog):
    home.write_text("a file where a folder should be")
    Started("key", "u").note(os.getpid())
    assert "record-not-written" in caplog.text
    assert Started("key", "u").orphans() == []
    home.unlink()
    started = Started("key", "u")
    started.note(os.getpid())
    (file,) = started._folder.glob("*.json")
    file.write_text("{")
    assert started.orphans() == [] and not file.exists()


def test_sighup_ends_the_proxy_gracefully():
    port = free_port()
    # If the tests run under nohup, the signal would rightly be ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with contextlib.ExitStack() as stack:
        try:
            process, url = stack.enter_context(
                command("--upstream", f"http://127.0.0.1:{port}", "--wake", engine(port))
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        pid = call(f"{url}/v1/x", {})[1]["pid"]
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0
        assert not alive(pid)


class Slow(BaseHTTPRequestHandler):
    """Sends an event every 0.1 s, thirty times."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path != "/stream":
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_header("Content-Length", str(30 * 9))
        self.end_headers()
        for n in range(30):
            self.wfile.write(b"data %02d\n\n" % n)
            self.wfile.flush()
            time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("who", ["every worker", "the group"])
def test_a_stream_is_finished_when_workers_end(who):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        upstream = f"http://127.0.0.1:{server.server_address[1]}"
        with command("--upstream", upstream, "--workers", "2") as (process, url):
            with getting(url, "/") as answer:
                assert answer.status == 200
            streams = contextlib.ExitStack()
            answer = streams.enter_context(getting(url, "/stream"))
            got = answer.read(9)
            workers = workers_of(process)
            assert len(workers) == 2
            for pid in [*workers, *([process.pid] if who == "the group" else [])]:
                os.kill(pid, signal.SIGTERM)
            if who == "every worker":
                with getting(url, "/again") as another:
                    assert another.status == 200, (another.status, another.read(), "other workers serve at once")
            with streams:
                got += answer.read()
            assert len(got) == 30 * 9
            if who == "every worker":
                eventually(lambda: call(f"{url}/-/status")[1]["workers"] == 2, "those that were told have ended")
            ending = time.monotonic()
        assert time.monotonic() - ending < 20, "none is waited for that was starting, and that nobody told to end"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_stop_answers_requests_that_a_replaced_worker_holds():
    """A service manager signals every process of a group: the workers, which are replaced, and then the proxy itself."""
    with (
        ThreadPoolExecutor(1) as client,
        command("--upstream", f"http://127.0.0.1:{free_port()}", "--workers", "2") as (
            process,
            url,
        ),
    ):
        held = client.submit(call, f"{url}/v1/completions", {"prompt": "x"})
        eventually(lambda: call(f"{url}/-/status")[1]["pools"][0]["held"] == 1, "it is held")
        for pid in workers_of(process):
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: len(workers_of(process)) == 3, "the one that holds it, and two new ones")
        assert not held.done()
        process.send_signal(signal.SIGTERM)
        status, answer = held.result(10)  # not once the time for requests in flight is over
        assert status == 503 and answer["error"]["code"] == "shutting-down"


def workers_of(process):
    """Return the process numbers of a proxy's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(p) for p in children if b"plugin.proxy.workers.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


@contextlib.contextmanager
def getting(url: str, path: str):
    """Return the answer to a request on a new connection."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        with connection.getresponse() as answer:
            yield answer
