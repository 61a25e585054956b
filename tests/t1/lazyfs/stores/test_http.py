"""An HTTP store whose server fails in every way: each failure has its error type, and every silence has a limit."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import threading
import time

import pytest

from lazyfs.errors import NotFound, Permanent, Temporary
from lazyfs.stores.http import WebStore
from tests.kits.lazyfs.rig import LIMIT_S

pytestmark = pytest.mark.t1


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    """Serves b"0123456789" with the fault named by the path."""

    protocol_version = "HTTP/1.1"
    body = b"0123456789" * 100_000

    def do_GET(self):
        fault, body = self.path.strip("/"), self.body
        if fault in ("404", "403", "429", "503", "500", "412"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hang-before":
            time.sleep(1.0)
            return
        start, end = 0, len(body) - 1
        status = 200
        if "Range" in self.headers and fault != "no-range":
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or end), end), 206
        if fault == "wrong-range":
            start, end = start + 1, end + 1
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("ETag", '"v1"')
        self.end_headers()
        part = body[start : end + 1]
        if fault in ("reset", "hang-within"):
            self.wfile.write(part[:1000])
            self.wfile.flush()
            if fault == "hang-within":
                time.sleep(1.0)
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass

    def finish(self):
        try:
            super().finish()
        except (OSError, ValueError):
            pass


@pytest.fixture(scope="module")
def origin():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyHandler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(LIMIT_S)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("404", NotFound),
        ("403", Permanent),
        ("412", Permanent),
        ("429", Temporary),
        ("503", Temporary),
        ("500", Temporary),
        ("hang-before", Temporary),
        ("hang-within", Temporary),
        ("reset", Temporary),
        ("wrong-range", Temporary),
    ],
)
def test_http_failures_have_their_error_types(origin, fault, kind):
    # Short limits, which a loaded machine may exceed, are used only for faults about limits.
    store = WebStore(origin, inactivity_s=0.3 if fault.startswith("hang") else LIMIT_S)
    with pytest.raises(kind) as caught:
        store.get(fault, 5, 10_000)
    assert "\n" not in str(caught.value)
    store.close()
    store = WebStore(origin, inactivity_s=LIMIT_S)
    assert store.get("fine", 5, 10) == b"5678901234"
    store.close()


def test_http_ranges(origin):
    store = WebStore(origin)
    assert store.get("fine", 3, 4) == b"3456"
    assert store.get("no-range", 3, 4) == b"3456"
    assert store.get("fine", 999_998) == b"89"
    assert len(store.get("fine")) == 1_000_000
    assert store.get("fine", 0, 5, '"v1"') == b"01234"
    with pytest.raises(Permanent) as caught:
        store.get("fine", 0, 5, '"v2"')
    assert caught.value.code == "source-changed"
    for write in (lambda: store.put("x", b""), lambda: list(store.list("x")), lambda: store.delete("x")):
        with pytest.raises(Permanent):
            write()
    store.close()


def test_http_silence_has_a_limit():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = WebStore(f"http://127.0.0.1:{silent.getsockname()[1]}", inactivity_s=0.2)
        with pytest.raises(Temporary):
            store.get("x")
    with pytest.raises(Temporary):
        store.get("x")
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_a_dripping_answer_has_a_total_limit(head):
    """Each byte comes within the inactivity limit: only the total limit ends the head, or the body."""
    stop = threading.Event()

    def drip():
        sock, _ = server.accept()
        with sock, contextlib.suppress(OSError):
            sock.recv(65536)
            sock.sendall(head)
            while not stop.wait(0.02):
                sock.sendall(b"a")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        store = WebStore(f"http://127.0.0.1:{server.getsockname()[1]}", inactivity_s=LIMIT_S, whole_s=0.3)
        threading.Timer(5.0, stop.set).start()
        with pytest.raises(Temporary, match="not complete in time"):
            store.get("x")
        assert not stop.is_set()
        stop.set()
        thread.join()
        store.close()


def test_a_redirect_may_hold_letters_that_no_request_line_has():
    there = WebStore._redirected("https://h/a", "/b\xe9 c?signature=a%2Fb~%3D")
    assert there == "https://h/b%E9%20c?signature=a%2Fb~%3D"


@pytest.mark.parametrize(("given", "wait"), [("3", 3.0), ("\xb2", None), ("soon", None)])
def test_only_a_number_of_seconds_is_a_pause(given, wait):
    answer = http.client.HTTPMessage()
    answer["Retry-After"] = given
    failed = WebStore("http://h")._status_error(503, "http://h/a", answer)
    assert isinstance(failed, Temporary) and failed.retry_after == wait
