"""`quickthaw proxy --config` as a process: more models than may be awake, the file, and adapters that keep a model awake."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kits.proxy.commands import call, command, engine, eventually, models_file

pytestmark = pytest.mark.t1


def red_or_blue(tmp_path: Path, red_more: str = "") -> str:
    """Write a file of two models of which one at a time may be awake. `red_more`: further keys of the first."""
    return models_file(
        tmp_path,
        f"""
max_awake: 1
min_awake: 0
models:
  red:  {{command: "{engine("${PORT}", "red")}"{red_more}}}
  blue: {{command: "{engine("${PORT}", "blue")}"}}
""",
    )


@pytest.mark.slow
def test_two_models_share_the_only_place(tmp_path):
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
        assert call(f"{url}/health") == (200, {"status": "ok"}), "a probe names no model"
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
        assert got[1]["name"] == "blue" and got[1]["body"] == renamed, "the engine's own name of the model"
        text = b'{"seed": 12345678901234567890, "x": {"model": "a"}, "model": "blue", "t": 1.10}'
        got = call(f"{url}/v1/x", text, **{"X-Echo": "1"})
        assert got[1]["body"] == '{"seed":12345678901234567890,"x":{"model": "a"},"model":"org/blue-7b","t":1.10}'
        squeezed = gzip.compress(json.dumps({"model": "green"}).encode())
        got = call(f"{url}/v1/x", squeezed, **{"Content-Encoding": "gzip"})
        assert got[1]["name"] == "green" and got[1]["length"] == len(squeezed), "the forwarded body is unchanged"
        assert call(f"{url}/v1/x", b"no gzip", **{"Content-Encoding": "gzip"})[1]["error"]["code"] == "content-encoding"
        form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nblue\r\n--b--\r\n'
        got = call(f"{url}/v1/audio/transcriptions", form, **{"Content-Type": "multipart/form-data; boundary=b"})
        assert got[1]["name"] == "blue"


def test_a_probe_without_a_model_tells_whether_any_model_accepts_requests(tmp_path):
    from plugin.proxy.endpoints.models import ModelRouter
    from plugin.proxy.endpoints.models_file import load
    from plugin.proxy.errors import Unavailable
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool

    config = load(Path(models_file(tmp_path, "models: {red: {command: x}, blue: {command: y}}")))
    pools = {name: ReplicaPool(name=name) for name in ("red", "blue")}
    router, request = ModelRouter(config, pools), Request()
    request.method, request.target, request.path = b"GET", b"/health", "/health"
    assert router.answer(request) == {"status": "ok"}
    pools["red"].close(Unavailable("gone", "gone"))
    assert router.answer(request) == {"status": "ok"}
    pools["blue"].close(Unavailable("gone", "gone"))
    with pytest.raises(Unavailable) as failed:
        router.answer(request)
    assert failed.value.code == "no-model-ready"
    request.target = b"/health?model=red"
    assert router.answer(request) is None, "the model's own"


@pytest.mark.slow
def test_models_share_the_gpu_memory(tmp_path):
    config = models_file(
        tmp_path,
        f"""
gpu_memory: 80GB
min_awake: 0
models:
  large: {{command: "{engine("${PORT}", "large")}", gpu_memory: 60GB}}
  small: {{command: "{engine("${PORT}", "small")}", gpu_memory: 20GB}}
  third: {{command: "{engine("${PORT}", "third")}", gpu_memory: 30GB}}
  cpu:   {{command: "{engine("${PORT}", "cpu")}", gpu_memory: 0}}
""",
    )
    with command("--config", config) as (_, url):

        def phases() -> dict[str, str]:
            return {m["id"]: m["phase"] for m in call(f"{url}/v1/models")[1]["data"]}

        for name in ("large", "cpu", "small"):
            assert call(f"{url}/v1/x", {"model": name})[1]["name"] == name
        assert phases() == {"large": "serving", "small": "serving", "third": "asleep", "cpu": "serving"}
        assert call(f"{url}/v1/x", {"model": "third"})[1]["name"] == "third"
        assert phases() == {"large": "asleep", "small": "serving", "third": "serving", "cpu": "serving"}
        pools = {pool["name"]: pool for pool in call(f"{url}/-/status")[1]["pools"]}
        assert {name: pool["gpu_memory_bytes"] for name, pool in pools.items()} == {
            "large": 60 * 10**9,
            "small": 20 * 10**9,
            "third": 30 * 10**9,
            "cpu": None,
        }
        assert pools["third"]["wake_s"] == 0.0 < pools["large"]["wake_s"]


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
        ("models: {a: {command: x}}\nsleep_after: soon", "90s, 10m or 24h"),
        ("models: {a: {command: x, upstream_timeout: -1}}", "of 0 or more"),
        ("models: {a: {command: x, wake_timeout: true}}", "is not a duration"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, said):
    from click.testing import CliRunner

    from plugin.proxy.cli import proxy as entry

    result = CliRunner().invoke(entry, ["--config", models_file(tmp_path, text), "--listen", "127.0.0.1:0"])
    assert result.exit_code == 2 and said in result.output
    assert "Traceback" not in result.output


def test_the_upstream_timeout_is_set_for_all_and_for_each_model(tmp_path):
    from plugin.options import Duration, Limit
    from plugin.proxy.endpoints.models import ModelRouter
    from plugin.proxy.endpoints.models_file import load
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
    assert Duration().convert("0", None, None) == 0.0


def test_old_keys_work_with_a_warning_and_a_current_one_takes_precedence(tmp_path):
    from plugin.proxy.endpoints.models_file import load, settings_in

    text = "models: {a: {command: x, idle_timeout: 90}, b: {command: x, idle_timeout: 1, sleep_after: 2}}\nidle_timeout: 10m"
    file, warned = Path(models_file(tmp_path, text)), []
    assert settings_in(file, warned.append) == {"sleep_after": "10m"}
    found = load(file).models
    assert (found["a"].sleep_after, found["b"].sleep_after) == (90.0, 2.0)
    places = [line.removeprefix(f"{file}: ").partition(";")[0] for line in warned]
    old = "idle_timeout is now sleep_after"
    assert places == [old, f"model 'a': {old}", f"model 'b': {old}"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_with_loaded_adapters_stays_awake(tmp_path, workers):
    config = red_or_blue(tmp_path, red_more=", sleep_after: 0.3")
    with command("--config", config, "--workers", workers) as (_, url):
        assert call(f"{url}/v1/load_lora_adapter?model=red", {"lora_name": "sql", "lora_path": "/l"})[0] == 200
        time.sleep(1.0)
        assert [m["phase"] for m in call(f"{url}/v1/models")[1]["data"]] == ["serving", "asleep"]
        status, answer = call(f"{url}/v1/x", {"model": "blue"})
        assert status == 503 and answer["error"]["code"] == "adapters-loaded"
        assert call(f"{url}/v1/x", {"model": "red"})[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("body", [b"{}", b"{"], ids=["left-before-the-refusal", "never-whole"])
def test_a_refused_adapter_request_keeps_no_model_awake(tmp_path, workers, body):
    config = red_or_blue(tmp_path)
    with command("--config", config, "--workers", workers) as (_, url):
        assert call(f"{url}/v1/x", {"model": "red"})[0] == 200
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            head = b"POST /refuse/load_lora_adapter?model=red HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\n"
            client.sendall(head + body)
            time.sleep(0.15)
        status, answer = call(f"{url}/v1/x", {"model": "blue"})
        assert status == 200, answer


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_that_loads_adapters_during_an_eviction_stays_awake(tmp_path, workers):
    config = red_or_blue(tmp_path)
    with command("--config", config, "--workers", workers) as (_, url), ThreadPoolExecutor(1) as pool:
        assert call(f"{url}/v1/x", {"model": "red"})[0] == 200
        load = pool.submit(call, f"{url}/slow/load_lora_adapter?model=red", {"lora_name": "sql"})
        eventually(
            lambda: "/slow/load_lora_adapter" in str(call(f"{url}/v1/x", {"model": "red"})[1]["paths"]), "it loads"
        )
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


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_foreign_listener_on_a_models_port_gets_no_request(tmp_path):
    ports = tmp_path / "port"
    wait = f"echo ${{PORT}} > {ports}; sleep 60"  # an engine that still imports its modules
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


@pytest.mark.slow
def test_a_file_of_llama_swap_is_served_as_it_is(tmp_path):
    file = models_file(
        tmp_path,
        f"""
models:
  red:  {{cmd: '{engine("${PORT}", "${MODEL_ID}")}', aliases: [crimson], concurrencyLimit: 3}}
  blue: {{cmd: '{engine("${PORT}", "${MODEL_ID}")}'}}
""",
    )
    with command("--import", file) as (_, url):
        for name, answered in (("red", "red"), ("blue", "blue"), ("crimson", "red")):
            assert call(f"{url}/v1/x", {"model": name})[1]["name"] == answered
        phases = [model["phase"] for model in call(f"{url}/v1/models")[1]["data"]]
        assert sorted(phases) == ["asleep", "serving"]
    ours = models_file(tmp_path, "models: {red: {command: x}}\nsleep_after: 5")
    done = subprocess.run(
        [sys.executable, "-m", "plugin", "proxy", "--import", ours], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "is no configuration of llama-swap" in done.stderr
