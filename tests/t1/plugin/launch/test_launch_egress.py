"""A way out of the sandbox: an engine fetches from a server outside before its dump and after a restore, through pasta."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import pytest

from plugin.proxy.process_tree import process_tree
from tests.kits.launch_rig import call

pytestmark = [pytest.mark.t1, pytest.mark.timeout(180)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"outside")

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client whose connection was closed before its dump


@contextlib.contextmanager
def server(address):
    with Server((address, 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made.server_address[1]
        made.shutdown()


@pytest.fixture
def outside():
    """The URL of a server at this host's own address, which no sandbox has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("198.51.100.1", 9))  # sends nothing
        address = sock.getsockname()[0]
    with server(address) as port:
        yield f"http://{address}:{port}/"


@pytest.fixture
def collector():
    """The port of a server at this host's loopback."""
    with server("127.0.0.1") as port:
        yield port


def fetched(started, url):
    return call(started.port, "POST", "/fetch", {"url": url})[1]


def multimodal(rig):
    (rig.model / "config.json").write_text(json.dumps({"architectures": ["Double"], "vision_config": {"depth": 1}}))


@pytest.mark.slow
def test_an_engine_reaches_the_network_before_its_dump_and_after_a_restore(rig, outside, collector):
    """Its open connection is closed before the dump, in both engines, and it makes new ones."""
    url = f"http://localhost:{collector}"
    trace = ["--otlp-traces-endpoint", url] if rig.engine == "vllm" else ["--enable-trace", f"--otlp-traces={url}"]
    answers = []
    for phase in ("warming", "restoring"):
        with rig.running(arguments=trace, env={"ENGINE_DOUBLE_FETCHES": outside}) as started:
            answers.append(started.ask())
            started.wait_serving()
            assert phase in started.phases()[0], started.text()
            assert fetched(started, outside) == {"text": "outside"}
            assert fetched(started, f"http://127.0.0.1:{collector}/") == {"text": "outside"}
            (again,) = call(started.port, "POST", "/fetch", {})[1]["again"]
            assert again != "outside"
            if phase == "warming":
                started.wait_for("engine double: fetched {'text': 'outside'}")
                assert again == "ConnectionAbortedError"
        assert len(rig.library.names()) == 1
    assert answers[0] == answers[1]
    with rig.running(rig.name, words=("restore",)) as started:
        started.ask()
        assert fetched(started, outside) == {"text": "outside"}


@pytest.mark.slow
def test_a_model_with_images_has_a_way_out_unless_the_user_wants_none(rig_of, outside):
    rig = rig_of("vllm")
    multimodal(rig)
    with rig.running() as started:
        started.ask()
        started.wait_serving()
        assert fetched(started, outside) == {"text": "outside"}
    with rig.running("--no-egress") as started:
        started.ask()
        started.wait_serving()
        assert fetched(started, outside) == {"error": "OSError"}
        assert started.ours().count("egress-off: ") == 1
        assert len(rig.library.names()) == 2, "with another network it is another engine"


@pytest.mark.slow
def test_without_pasta_such_a_model_starts_as_it_would_alone(rig_of, outside):
    rig = rig_of("sglang")
    multimodal(rig)
    with rig.running(env={"QUICKTHAW_PASTA": "/nowhere/pasta"}) as started:
        started.ask()
        assert fetched(started, outside) == {"text": "outside"}
        (line,) = re.findall(r"^quickthaw: .*egress-missing.*$", started.ours(), re.M)
        assert "a model that takes images" in line and "passt" in line and "--no-egress" in line
        assert rig.library.names() == []
    done = rig.cli(
        *("launch", "--strict", "--egress", "--engine-python", rig.python, "sglang", "--model-path", rig.model),
        QUICKTHAW_PASTA="/nowhere/pasta",
    )
    assert done.returncode == 1 and "egress-missing: --egress needs a way out" in done.stderr


@pytest.mark.slow
def test_a_pasta_that_fails_costs_the_sandbox_only(rig_of, outside, tmp_path):
    rig = rig_of("sglang")
    broken = tmp_path / "pasta"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    broken.chmod(0o755)
    with rig.running("--egress", env={"QUICKTHAW_PASTA": str(broken)}) as started:
        started.ask()
        assert "egress-failed: pasta cannot serve the sandbox (it ended with 3: broken)" in started.ours()
        assert fetched(started, outside) == {"text": "outside"}


@pytest.mark.slow
def test_a_pasta_that_ends_is_started_again_and_none_outlives_a_killed_launch(rig_of, outside):
    rig = rig_of("sglang")
    started = rig.start("--egress", "--no-snapshot", "--no-mount")
    try:
        started.ask()
        assert "HF_HUB_OFFLINE" not in started.facts()["worker"]["environment"]
        (pid,) = pastas(started.process.pid)
        os.kill(pid, signal.SIGKILL)
        started.wait_for("egress-ended: pasta ended with -9")
        limit = time.monotonic() + 30
        while fetched(started, outside) != {"text": "outside"}:
            assert time.monotonic() < limit, started.ours()
            time.sleep(0.1)
    finally:
        started.stop(signal.SIGKILL)
    assert rig.watch.gone() == set()


def pastas(parent):
    """The processes of pasta below a launch."""
    name = shutil.which("pasta")
    found = []
    for pid in process_tree(parent):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as line:
            if line.read().split(b"\0")[0].decode() == name:
                found.append(pid)
    return found
