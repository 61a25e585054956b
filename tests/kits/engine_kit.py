"""Launches a real engine and queries it. The fixture `rig` (conftest.py) has one cold start of each engine."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from checkpoint.snapshot.library import Library
from plugin.bench import client as measure
from plugin.bench.presets import preset
from plugin.runtime.config import state_home
from tests.kits.leftovers import Watch

REPO = Path(__file__).parents[2]


ROUTES = REPO / "tests" / "programs" / "engine_routes.py"


NAME = "under-test"


COLD_LIMIT_S = 900.0


class Rig:
    """One engine with a state folder of its own. Compile caches and CRIU are the machine's."""

    def __init__(self, engine, home):
        self.engine, self.home = engine, home
        self.preset = preset(engine, state_home())
        # The tokenizer has its own folder, because a test edits it.
        self.tokenizer = home / "tokenizer"
        shutil.copytree(self.preset.model, self.tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
        flag = "--tokenizer" if engine == "vllm" else "--tokenizer-path"
        extra = (
            ("--max-logprobs", "20") if engine == "vllm" else ()
        )  # vLLM's default; the drop-in rows spell it otherwise
        self.arguments = (*self.preset.arguments, flag, str(self.tokenizer), *extra)
        self.library = Library(home)
        self.cold_text = ""
        self.cold_status = {}
        self.watch = Watch(home)

    def command(self, *options, words=("launch",), arguments=None, **environment):
        port = measure.free_port()
        env = {
            **os.environ,
            **self.preset.environment,
            "QUICKTHAW_HOME": str(self.home),
            "QUICKTHAW_REHEARSE": "0",  # tests of the first restore need one that was not rehearsed
            **self.watch.environment,
            **environment,
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        argv = [sys.executable, "-m", "plugin", *words, *options]
        if words[0] == "launch":
            argv += [
                "--engine-python",
                str(self.preset.python),
                *([] if "--snapshot-name" in options else ["--snapshot-name", NAME]),
                # `auto` would depend on the machine's load.
                *([] if "--weights" in options else ["--weights", "included"]),
                self.engine,
            ]
            argv += [*(self.arguments if arguments is None else arguments), "--host", "127.0.0.1"]
        argv += ["--port", str(port)]
        return port, measure.Command(argv, env, self.home / f"{'-'.join(words)}-{port}.log", REPO)

    @contextlib.contextmanager
    def running(self, *options, limit_s=COLD_LIMIT_S, **more):
        """Run a command until its first answer; at the end stop it with SIGTERM and assert that nothing of it is
        left.
        """
        port, command = self.command(*options, **more)
        process = command.start()
        try:
            answer = measure.waiting_client(port, str(self.preset.model), command.began, limit_s, process)
            yield port, answer, process, command
        finally:
            code = command.stop()
            text = command.log.read_text(errors="replace")
            assert "Traceback" not in own_lines(text), own_lines(text)[-3000:]
        assert code in (0, 143), text[-2000:]
        assert self.watch.gone() == set()


def share_state(home):
    """Give a state folder the machine's compile caches and CRIU."""
    shared = state_home()
    (shared / "compile").mkdir(mode=0o700, exist_ok=True)
    (home / "compile").symlink_to(shared / "compile")
    (home / "criu").symlink_to(shared / "criu")


def own_lines(text):
    """The log's lines that are quickthaw's own, with what follows a traceback of ours."""
    return "\n".join(
        line
        for line in text.splitlines()
        if line.startswith(("quickthaw:", "Traceback")) and "site-packages" not in line
    )


def post(port, path, body, timeout_s=60.0):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def answer_at_rest(rig, port):
    """What a cold start answers once the engine calls itself healthy.

    SGLang answers before its own warm-up, which may share a step with a request and so round it to other tokens (docs/limits.md).
    """
    limit = time.monotonic() + 120
    while fetch(port, "/health")[0] != 200:
        assert time.monotonic() < limit
        time.sleep(0.2)
    return measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 300.0).text


def fetch(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def get(port, path):
    return fetch(port, path)[1]


def phases(port):
    return [[span["phase"] for span in r["timeline"]] for r in measure.status(port)["pools"][0]["replicas"]]


def routes(rig, arguments, environment):
    """Return the routes [method, path] of the engine's own application, built in its interpreter."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as out:
        env = {**os.environ, **rig.preset.environment, **environment, "ROUTES_FD": str(writer)}
        argv = [str(rig.preset.python), str(ROUTES), rig.engine, *arguments]
        done = subprocess.run(argv, env=env, pass_fds=[writer], capture_output=True, text=True, timeout=300)
        os.close(writer)
        assert done.returncode == 0, done.stderr[-2000:]
        return {tuple(route) for route in json.load(out)}


def engine_root(process):
    """Return the host's PID of the engine's first process."""
    from checkpoint.sandbox.process_tree import processes

    ours = os.readlink("/proc/self/ns/pid")
    inside = [
        pid
        for pid in processes(process.pid)
        if os.path.exists(f"/proc/{pid}/ns/pid") and os.readlink(f"/proc/{pid}/ns/pid") != ours
    ]
    # The engine's root is the first child of process 1.
    return min(pid for pid in inside if inner_pid(pid) > 1000)


def inner_pid(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0
