"""`quickthaw ps` and its siblings say in one line why they got no answer."""

import http.client
import io
import re
import socket
import threading

import click
import pytest

from plugin import models

pytestmark = pytest.mark.t0


def refusal(monkeypatch, status, body):
    """Return what a command says of an answer."""

    class Connection:
        def __init__(self, *_, **__):
            pass

        def request(self, *_, **__):
            pass

        def getresponse(self):
            answer = io.BytesIO(body)
            answer.status = status
            return answer

        def close(self):
            pass

    monkeypatch.setattr(http.client, "HTTPConnection", Connection)
    with pytest.raises(models.Refused) as caught:
        models.call("http://127.0.0.1:8000", "GET", "/-/status", None, 1.0)
    return str(caught.value)


def test_a_quickthaw_at_a_unix_socket_is_reached(tmp_path):
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer():
            client, _ = listening.accept()
            with client:
                got.append(client.recv(4096))
                client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"pools":[]}')

        got = []
        server = threading.Thread(target=answer)
        server.start()
        assert models.call(f"unix:{path}", "GET", "/-/status", "secret", 5.0) == {"pools": []}
        server.join()
    assert got[0].startswith(b"GET /-/status HTTP/1.1\r\n") and b"Authorization: Bearer secret" in got[0]
    with pytest.raises(models.Refused, match="not-reached: no quickthaw answers at unix:"):
        models.call(f"unix://{path}", "GET", "/-/status", None, 5.0)


@pytest.mark.parametrize("url", ["ftp://x", "unix:", "here", "http://"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(click.UsageError, match="is not http://HOST:PORT"):
        models.call(url, "GET", "/-/status", None, 5.0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b'{"error": {"message": "no such page", "type": "NotFoundError", "param": null, "code": 404}}'),
        (404, b'{"error": "no such page"}'),
        (404, b'{"detail": "Not Found"}'),
        (200, b"[]"),
    ],
    ids=["vLLM", "text", "FastAPI", "a list"],
)
def test_another_server_is_not_taken_for_quickthaw(monkeypatch, status, body):
    said = refusal(monkeypatch, status, body)
    assert said.startswith(f"not-quickthaw: no quickthaw answers at http://127.0.0.1:8000; /-/status answered {status}")
    assert "--url" in said and "--admin-prefix" in said


def test_the_list_of_models_is_named_only_where_it_helps(monkeypatch):
    said = [
        refusal(monkeypatch, 404, b'{"error": {"code": "%b", "message": "m"}}' % code)
        for code in (b"model-not-found", b"admin-unauthorized")
    ]
    assert said == ["model-not-found: m; quickthaw ps lists the models", "admin-unauthorized: m"]


def test_a_list_says_what_each_model_holds_and_costs():
    replica = {"name": "r0", "seconds_in_phase": 61.2, "outstanding": 0}
    awake = replica | {"phase": "serving", "memory_bytes": 2 * 10**9, "gpu_bytes": 60 * 10**9}
    resting = replica | {"phase": "standby", "memory_bytes": 10**9, "gpu_bytes": None}
    pools = [
        {"name": "a", "held": 1, "wake_s": 0.0, "gpu_memory_bytes": 64 * 10**9, "replicas": [awake]},
        {"name": "b", "held": 0, "wake_s": 0.131, "gpu_memory_bytes": None, "replicas": [resting]},
        {"name": "c", "held": 0, "replicas": [resting]},  # of an older quickthaw
    ]
    columns = [re.split("  +", line) for line in models.table({"pools": pools}).splitlines()]
    assert columns[0] == ["MODEL", "REPLICA", "STATE", "FOR", "MEMORY", "GPU", "GPU AWAKE", "WAKE", "REQUESTS"]
    assert columns[1][2:8] == ["serving", "61 s", "2000 MB", "60000 MB", "64000 MB", "0.00 s"]
    assert columns[2][2:8] == ["standby", "61 s", "1000 MB", "-", "-", "0.13 s"] and columns[3][7] == "-"
