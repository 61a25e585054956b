"""vLLM's control middleware: requests with the current key are served; all others are passed on unchanged."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import launchers
from launchers import control
from launchers.engine_site import engine_site
from launchers.errors import LauncherError
from launchers.vllm import CONTROL_HEADER, CONTROL_MIDDLEWARE, CONTROL_PATH
from plugin.engine import vllm_control
from plugin.engine.vllm_control import ControlMiddleware

pytestmark = pytest.mark.t0


class EngineClient:
    def __init__(self):
        self.calls = []

    async def reset_prefix_cache(self):
        self.calls.append("reset")
        return False

    async def collective_rpc(self, method, timeout=None):
        self.calls.append((method, timeout))
        return [object()]

    async def sleep(self, level=1):
        self.calls.append(("sleep", level))

    async def wake_up(self, tags=None):
        raise RuntimeError("no such tag")


def ask(client, asked, *keys, path=CONTROL_PATH, **more):
    """Return status and answer of one request; status 0 if it was passed on to the application."""
    sent = []

    async def application(scope, receive, send):
        sent.append({"status": 0})
        sent.append({"body": b"null"})

    async def receive():
        return {"type": "http.request", "body": json.dumps(asked).encode()}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "path": path,
        "headers": [(CONTROL_HEADER.lower().encode(), key.encode()) for key in keys],
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=client)),
        **more,
    }
    asyncio.run(ControlMiddleware(application)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_CONTROL_DIR", str(tmp_path))
    return tmp_path


def test_the_launchers_calls_are_served_with_the_key(folder):
    client = EngineClient()
    with control.key(folder) as key:
        assert ask(client, {"call": "reset_prefix_cache"}, key) == (200, {"result": False})
        asked = {"call": "collective_rpc", "method": "quickthaw_trim", "timeout": 60}
        assert ask(client, asked, key) == (200, {"result": None})
        assert ask(client, {"call": "sleep", "level": 2}, key) == (200, {"result": None})
        status, answer = ask(client, {"call": "wake_up", "tags": ["weights"]}, key)
        assert (status, answer["error"]) == (500, "RuntimeError: no such tag")
    assert client.calls == ["reset", ("quickthaw_trim", 60), ("sleep", 2)]


@pytest.mark.parametrize(
    "asked",
    [
        {"call": "collective_rpc", "method": "determine_available_memory"},
        {"call": "collective_rpc", "method": "__init__"},
        {"call": "collective_rpc"},
        {"call": "abort"},
        {},
        [],
        {"call": "sleep"},
    ],
)
def test_other_calls_are_refused_even_with_the_key(folder, asked):
    client = EngineClient()
    with control.key(folder) as key:
        assert ask(client, asked, key)[0] == 500
    assert client.calls == []


def test_a_request_without_this_calls_key_is_passed_on(folder):
    client = EngineClient()
    asked = {"call": "reset_prefix_cache"}
    with control.key(folder) as old:
        pass
    assert ask(client, asked, old) == ask(client, asked) == ask(client, asked, "") == (0, None)
    with control.key(folder) as key:
        assert key != old
        for given in ((), (old,), ("",), (key[:-1],), (key + "0",), (key, key), (key, old), ("k" * 64,)):
            assert ask(client, asked, *given) == (0, None), given
        for path in ("/api" + CONTROL_PATH, CONTROL_PATH + "/", CONTROL_PATH.upper(), "/v1/models"):
            assert ask(client, asked, key, path=path) == (0, None)
        assert ask(client, asked, key, type="websocket") == (0, None)
    (folder / "key").write_text("")  # an empty file is no key
    assert ask(client, asked, "") == (0, None)
    assert client.calls == []


def test_a_key_is_valid_for_one_call_and_private(folder, monkeypatch):
    with control.key(folder) as key:
        assert (folder / "key").stat().st_mode & 0o777 == 0o600
        assert len(bytes.fromhex(key)) == 32
    assert list(folder.iterdir()) == []
    with pytest.raises(RuntimeError), control.key(folder):
        raise RuntimeError
    assert list(folder.iterdir()) == []
    monkeypatch.delenv("QUICKTHAW_CONTROL_DIR")
    with control.key(folder) as key:
        assert ask(EngineClient(), {"call": "reset_prefix_cache"}, key) == (0, None)


def test_launcher_and_engine_use_the_same_names():
    assert CONTROL_PATH == vllm_control.PATH
    assert CONTROL_HEADER.lower().encode() == vllm_control.HEADER
    assert f"quickthaw_engine.vllm_control.{ControlMiddleware.__name__}" == CONTROL_MIDDLEWARE


def test_the_users_middlewares_are_kept_inside_the_control_middleware():
    engine = launchers.engine("vllm")
    command = engine.parse(["--model", "m", "--middleware", "a.B", "--middleware=c.D", "--root-path", "/api"], {})
    argv = engine.command("python", command, "127.0.0.1", 8000)
    assert not any("quickthaw" in word for word in argv), "the user's arguments are not changed"
    assert command.root_path == "/api" and {"--middleware", "a.B", "--middleware=c.D", "/api"} <= set(argv)
    assert engine.control_arguments() == ("--middleware", CONTROL_MIDDLEWARE)


def test_the_engine_site_has_no_empty_package(tmp_path):
    (tmp_path / "sources").mkdir()
    with pytest.raises(LauncherError, match="engine-site-missing"):
        engine_site(tmp_path / "home", tmp_path / "sources")
    made = engine_site(tmp_path / "home", Path(vllm_control.__file__).parent)
    assert (made / "quickthaw_engine" / "vllm_control.py").is_file()
