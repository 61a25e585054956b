"""`quickthaw ps` and its siblings say in one line why they got no answer."""

import http.client
import io

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
