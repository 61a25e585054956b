"""Real engines behind TLS, on a Unix socket, with made-up weights, and sending traces out of the sandbox: cold, then restored, the same answer."""

import contextlib
import http.client
import http.server
import json
import socket
import ssl
import threading
import time

import pytest

from launchers.bare import free_port
from plugin.bench import client as measure
from tests.kits.dropin_rows import DOORS
from tests.kits.engine_kit import COLD_LIMIT_S, Rig, own_lines, phases, share_state
from tests.kits.launch_rig import UnixConnection
from tests.kits.tls_kit import Authority

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


class Collector(http.server.ThreadingHTTPServer):
    """Takes what an OpenTelemetry exporter sends, at this host's own address, which no sandbox has."""

    daemon_threads = True

    def __init__(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("198.51.100.1", 9))  # sends nothing
            super().__init__((sock.getsockname()[0], 0), Traces)
        self.received = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a connection that was closed before the dump


class Traces(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.received += bool(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    with Collector() as made:
        yield made
        made.shutdown()


def wait_for(condition, limit_s, process):
    limit = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in DOORS])
def test_it_is_reached_as_the_engine_alone_would_be_cold_and_restored(row, tmp_path, collector):
    share_state(tmp_path)
    rig, authority = Rig(row.engine, tmp_path), Authority(tmp_path / "certificates")
    pair, path = authority.pair("server"), tmp_path / "engine.sock"
    trusted = ssl.create_default_context(cafile=authority.file)
    values = {
        "model": rig.preset.model,
        "tokenizer": rig.tokenizer,
        "certificate": pair.certificate,
        "key": pair.key,
        "socket": path,
        "collector": f"http://{collector.server_address[0]}:{collector.server_address[1]}/v1/traces",
    }
    words = [word.format(**values) for word in row.words]

    def answer_of(first):
        admin, received = free_port(), collector.received
        port, command = rig.command("--admin-listen", f"127.0.0.1:{admin}", arguments=words[1:], **row.environment)
        process = command.start()
        connection = (
            UnixConnection(path, COLD_LIMIT_S)
            if "--uds" in words
            else http.client.HTTPSConnection("localhost", port, timeout=COLD_LIMIT_S, context=trusted)
        )

        def serving():
            with contextlib.suppress(OSError):
                return measure.status(admin)["pools"][0]["replicas"][0]["phase"] == "serving"

        try:
            wait_for(serving, COLD_LIMIT_S, process)  # at a cold start: after its snapshot, too
            with contextlib.closing(connection):
                body = {"model": str(rig.preset.model), "prompt": "The sky", "max_tokens": 8, "temperature": 0}
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = json.loads(response.read())["choices"][0]["text"]
            assert first in phases(admin)[0] and "failed" not in phases(admin)[0]
            if "{collector}" in row.words:
                wait_for(lambda: collector.received > received, 60, process)
            return response.status, text
        finally:
            command.stop()
            assert "off:" not in own_lines(command.log.read_text(errors="replace"))
            assert not path.exists() and rig.watch.gone() == set()

    cold, restored = answer_of("starting"), answer_of("restoring")
    assert cold[0] == 200 and cold[1] and restored == cold
