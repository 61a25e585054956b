"""Every row of docs/compatibility.md with the real engines (tests/kits/dropin_rows.py): what starts alone starts under quickthaw.

Rows of one meaning share one cold start and its snapshot; options of the engines share a second one.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launchers.bare import free_port
from plugin.bench import client as measure
from tests.kits import dropin_page, dropin_rows, small_models
from tests.kits.dropin_rows import ADAPTER, AS_GIVEN, PLAIN, RESTORED, SERVED
from tests.kits.engine_kit import COLD_LIMIT_S, NAME, REPO, Rig, answer_at_rest, get, own_lines, phases, share_state
from tests.kits.hub_kit import Hub

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]
RESTORES = ("restoring", "waking", "verifying")
HUB_NAME, HUB_TOKEN, API_KEY = "acme/SmolLM2", "hf_of_a_test", "key-of-a-test"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if tools %}Tools: {{ tools | length }}\n{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows(*groups):
    """Parametrize a test over rows; conftest.py leaves out those that are not for the rig's engine."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for group in groups for row in group])


def prepared(rig, row, tmp_path, *options):
    """The row's command on a free port: the port and the command."""
    port = free_port()
    link = tmp_path / "link"
    link.symlink_to(rig.preset.model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o777)
    values = {
        "model": rig.preset.model,
        "tokenizer": rig.tokenizer,
        "script": rig.preset.python.parent / rig.engine,
        "python": rig.preset.python,
        "port": port,
        "folder": tmp_path / "folder",
        "link": link,
        "home": rig.home.parent,
    }

    def fill(word):
        for name, value in values.items():
            word = word.replace(f"{{{name}}}", str(value))
        return word

    words = [fill(word) for word in row.words]
    if not any("--port" in word for word in words):
        words += ["--port", str(port)]
    named = words[0] == rig.engine
    argv = [
        *(["sh", "-c", fill(row.before), "sh"] if row.before else []),
        *(sys.executable, "-m", "plugin", "launch", "--snapshot-name", NAME, "--weights", "included"),
        *(["--engine-python", str(rig.preset.python)] if named else []),
        *([] if row.outcome == AS_GIVEN else ["--no-snapshot"]),
        *options,
        *row.options,
        *words,
    ]
    env = os.environ | rig.preset.environment | rig.watch.environment | {"QUICKTHAW_HOME": str(rig.home)}
    env |= {name: fill(value) for name, value in row.environment.items()}
    unset = {"PYTHONDONTWRITEBYTECODE", *(name for name, value in row.environment.items() if not value)}
    env = {name: value for name, value in env.items() if name not in unset}
    return port, measure.Command(argv, env, tmp_path / "log", REPO)


@contextlib.contextmanager
def started(rig, row, tmp_path):
    """The row's command with its first answer; SIGTERM at the end, and nothing of it left."""
    port, command = prepared(rig, row, tmp_path)
    process = command.start()
    answer = None
    limit_s = 60.0 if row.outcome == RESTORED else COLD_LIMIT_S
    try:
        answer = measure.waiting_client(port, str(rig.preset.model), command.began, limit_s, process)
        yield port, answer, command
    finally:
        if row.outcome == RESTORED:  # a second signal ends the engine at once; other tests wait for an orderly stop
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        code = command.stop()
        text = command.log.read_text(errors="replace")
        assert answer, text[-4000:]
    assert "Traceback" not in own_lines(text), text[-4000:]
    assert code in (0, 130, 143, -15), text[-2000:]  # 130 is that of a second signal
    assert rig.watch.gone() == set()


@rows(dropin_rows.SPELLINGS, dropin_rows.SURROUNDINGS)
def test_the_snapshot_serves_whoever_means_the_same(rig, row, tmp_path):
    with started(rig, row, tmp_path) as (port, answer, _):
        assert answer.text == rig.cold_text
        limit = time.monotonic() + 60
        while {replica["phase"] for replica in measure.status(port)["pools"][0]["replicas"]} != {"serving"}:
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert [found[-3:] for found in phases(port)] == [[*RESTORES]] * (2 if "--replicas" in row.options else 1)


@rows(dropin_rows.DIFFERENT)
def test_what_means_something_else_is_refused_with_a_code(rig, row, tmp_path):
    _, command = prepared(rig, row, tmp_path, "--strict")
    assert command.start().wait(120) == 1
    text = command.log.read_text()
    assert row.code in text, text[-2000:]
    rig.library.clear_failures(NAME)
    assert rig.watch.gone() == set()


@rows(dropin_rows.PLAINLY)
def test_it_starts_plainly_and_says_why(rig, row, tmp_path):
    with started(rig, row, tmp_path) as (port, answer, command):
        assert answer.text and answer_at_rest(rig, port) == rig.cold_text
        if row.outcome == PLAIN:
            assert phases(port)[0][-3:] == ["starting", "loading", "warming"]
        lines = [line for line in command.log.read_text().splitlines() if line.startswith("quickthaw:")]
        assert sum(row.code in line for line in lines) == 1, lines
        if row.outcome == AS_GIVEN:
            assert len(lines) == 1


@rows(dropin_rows.COMMANDS)
def test_what_starts_no_server_runs_as_given(rig, row):
    words = [word.replace("{python}", str(rig.preset.python)) for word in row.words]
    argv = [sys.executable, "-m", "plugin", "launch", "--engine-python", str(rig.preset.python), *words]
    env = os.environ | rig.preset.environment | {"QUICKTHAW_HOME": str(rig.home)}
    done = subprocess.run(argv, env=env, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert row.expected in done.stdout, (done.stdout[-1000:], done.stderr[-1000:])


# Options of the engines: one cold start and one restore, asked the same


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def featured(request, tmp_path_factory):
    """A launch by a hub's name with a file of options; each feature's (status, answer), cold and restored."""
    engine = request.param
    home = tmp_path_factory.mktemp(f"featured-{engine}")
    share_state(home)
    rig, hub = Rig(engine, home), Hub()
    hub.add(HUB_NAME, rig.preset.model, token=HUB_TOKEN)
    options = engine_options(rig)
    (home / "engine.yaml").write_text(yaml.safe_dump(options))
    words = {
        "vllm": ["--", str(rig.preset.python.parent / "vllm"), "serve", "--config", str(home / "engine.yaml")],
        "sglang": ["--", str(rig.preset.python), "-m", "sglang.launch_server", "--config", str(home / "engine.yaml")],
    }[engine]
    asked = [row for row in dropin_rows.FEATURES if row.engine == engine]
    found = {}
    try:
        for expected in ("starting", "restoring"):
            found[expected] = answers(rig, words, asked, expected, hub.environment(home / "hf", HF_TOKEN=HUB_TOKEN))
            if expected == "starting":
                found["downloads"] = hub.downloads()
                hub.requests.clear()
        found["asked the hub"] = list(hub.requests)
        found["model"] = rig.library.load(NAME).model_path.startswith(str(home / "hf" / "hub"))
        yield found
    finally:
        hub.close()
        shutil.rmtree(home, ignore_errors=True)


def engine_options(rig):
    """What the file of `--config` holds."""
    (rig.home / "template.jinja").write_text(TEMPLATE)
    common = {
        "served-model-name": SERVED,
        "api-key": API_KEY,
        "chat-template": str(rig.home / "template.jinja"),
        "tool-call-parser": "hermes" if rig.engine == "vllm" else "qwen25",
        "reasoning-parser": "qwen3",
    }
    if rig.engine == "vllm":
        adapter = small_models.adapter(rig.preset.model, rig.home / "adapter")
        return common | {
            "model": HUB_NAME,
            "enable-lora": True,
            "enable-auto-tool-choice": True,
            "lora-modules": [f"{ADAPTER}={adapter}"],
            "max-lora-rank": 8,
            "speculative-config": json.dumps(
                {
                    "method": "draft_model",
                    "model": str(small_models.draft(rig.preset.model, rig.home / "draft")),
                    "num_speculative_tokens": 2,
                }
            ),
            "structured-outputs-config": '{"enable_in_reasoning": true}',
            "enforce-eager": True,  # spares a compilation; the other starts compile
        }
    return common | {
        "model-path": HUB_NAME,
        "device": "cpu",
        "attention-backend": "torch_native",
        "max-total-tokens": 16384,
    }


def answers(rig, words, asked, expected, environment):
    """Start the command, wait until it serves, and send each feature's request."""
    port = free_port()
    argv = [sys.executable, "-m", "plugin", "launch", "--snapshot-name", NAME, "--weights", "included", *words]
    env = os.environ | rig.preset.environment | rig.watch.environment | {"QUICKTHAW_HOME": str(rig.home)} | environment
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = measure.Command([*argv, "--port", str(port)], env, rig.home / f"log-{expected}", REPO)
    process = command.start()
    try:
        limit = time.monotonic() + COLD_LIMIT_S
        while True:
            assert process.poll() is None and time.monotonic() < limit, command.log.read_text()[-4000:]
            with contextlib.suppress(OSError, ValueError, LookupError):
                if measure.status(port)["pools"][0]["replicas"][0]["phase"] == "serving":
                    break
            time.sleep(0.05)
        assert expected in phases(port)[0] and "failed" not in phases(port)[0], command.log.read_text()[-4000:]
        return {row.name: ask(port, row) for row in asked} | {"metrics": get(port, "/metrics").decode()}
    finally:
        command.stop()
        text = command.log.read_text(errors="replace")
        assert rig.watch.gone() == set()
        assert "off:" not in own_lines(text), own_lines(text)


def ask(port, row):
    """The status and the answer, without what differs from one request to the next."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {API_KEY}"} if row.key else {})
    with contextlib.closing(connection):
        method = "GET" if row.body is None else "POST"
        connection.request(method, row.path, None if row.body is None else json.dumps(row.body), headers)
        response = connection.getresponse()
        data = json.loads(response.read() or b"null")
    return response.status, stable(data)


def stable(value):
    """An answer without its identifiers, times and metadata."""
    if isinstance(value, dict):
        return {
            key: stable(item) for key, item in value.items() if key not in ("id", "created", "metadata", "permission")
        }
    return [stable(item) for item in value] if isinstance(value, list) else value


@rows(dropin_rows.FEATURES)
def test_a_restored_engine_answers_as_the_cold_one(featured, row):
    status, answer = featured["starting"][row.name]
    assert status == row.status, answer
    assert re.search(row.expected, json.dumps(answer))
    assert featured["restoring"][row.name] == (status, answer)
    if ADAPTER in json.dumps(row.body):
        base = featured["starting"][f"{row.engine}-a-completion"][1]
        assert answer["choices"][0]["text"] != base["choices"][0]["text"]


@pytest.mark.engine("vllm")
def test_the_draft_model_of_a_restored_engine_drafts(featured):
    for start in ("starting", "restoring"):
        assert re.search(r"spec_decode_num_draft_tokens_total\{[^}]*\} [1-9]", featured[start]["metrics"])


def test_a_hub_name_is_downloaded_once_and_a_restore_asks_no_hub(featured):
    assert featured["downloads"].count("model.safetensors") == 1
    assert featured["asked the hub"] == []
    assert featured["model"]


# The page


def test_the_page_is_the_table():
    page = Path(REPO / "docs" / "compatibility.md").read_text()
    assert page == dropin_page.page(), "run: python -m tests.kits.dropin_page > docs/compatibility.md"
    assert len(dropin_page.table()) >= 60
