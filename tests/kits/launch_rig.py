"""Launches with the engine double (tests/programs/engine_double). quickthaw itself is real, from the command line to
CRIU.

`environment(folder)` makes an interpreter with the double installed as `sglang` and `vllm`. `Rig` runs commands with
it.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from checkpoint.snapshot.library import Library
from launchers.bare import free_port
from plugin.runtime.config import state_home
from tests.kits.leftovers import Watch

REPO = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parents[1] / "programs"
WEIGHT_BYTES = 4 << 20
PROMPT = "The quick brown fox"

_TORCH = '''\
"""A double of torch: tensors are anonymous memory, the generator is a number."""
import ctypes, mmap, os, types

class Storage:
    def __init__(self, memory): self.memory = memory
    def data_ptr(self): return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
    def nbytes(self): return len(self.memory)

class Tensor:
    device = types.SimpleNamespace(type="cpu")
    def __init__(self, memory): self.memory = memory
    @property
    def data(self): return self
    def is_shared(self): return False
    def is_pinned(self): return False
    def untyped_storage(self): return Storage(self.memory)

class Generator:
    state = 1
    def manual_seed(self, seed): self.state = seed

class HostCache:
    """As PyTorch's: freed pinned memory is kept for its next use."""
    free, used = [], False
    @classmethod
    def pin(cls, size):
        cls.used = True
        if cls.free: return cls.free.pop()
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = os.urandom(1 << 20) * (size >> 20)
        return memory
    @classmethod
    def empty(cls):
        for memory in cls.free: memory.close()
        cls.free.clear()

accelerator = types.SimpleNamespace(empty_host_cache=HostCache.empty)
default_generator = Generator()
cuda = types.SimpleNamespace(is_initialized=lambda: HostCache.used, empty_cache=lambda: None, manual_seed_all=lambda seed: None)
'''
_HOOKS = """\
class HookType:
    AFTER, AROUND = "after", "around"

class HookRegistry:
    hooks = {}
    @classmethod
    def register(cls, target, hook, kind): cls.hooks[target.rpartition(".")[2]] = hook
    @classmethod
    def after(cls, name, result, *arguments):
        hook = cls.hooks.get(name)
        return hook(result, *arguments) if hook else result
    @classmethod
    def around(cls, name, original, *arguments):
        hook = cls.hooks.get(name)
        return hook(original, *arguments) if hook else original(*arguments)
"""
_ANSWER = """\
class UpdateWeightFromDiskReqOutput:
    def __init__(self, success, message, num_paused_requests): self.success = success
"""
_FILES = {
    "torch/__init__.py": _TORCH,
    "sglang/__init__.py": "",
    "sglang/launch_server.py": "import engine_double\nengine_double.main('sglang')\n",
    "sglang/srt/__init__.py": "",
    "sglang/srt/plugins/__init__.py": "",
    "sglang/srt/plugins/hook_registry.py": _HOOKS,
    "sglang/srt/managers/__init__.py": "",
    "sglang/srt/managers/io_struct.py": _ANSWER,
    "sglang/srt/managers/scheduler_components/__init__.py": "",
    "sglang/srt/managers/scheduler_components/weight_updater.py": "",
    "vllm/__init__.py": "",
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/openai/__init__.py": "",
    "vllm/entrypoints/cli/__init__.py": "",
    "vllm/entrypoints/cli/main.py": "import sys\nimport engine_double\nsys.argv.remove('serve')\nengine_double.main('vllm')\n",
    "vllm/entrypoints/openai/api_server.py": "import engine_double\nengine_double.main('vllm')\n",
    "vllm/v1/__init__.py": "",
    "vllm/v1/worker/__init__.py": "",
    "vllm/v1/worker/worker_base.py": "class WorkerBase:\n    pass\n",
    **{
        f"{name}-0.0.1.dist-info/{file}": text
        for name in ("sglang", "vllm", "torch_memory_saver")
        for file, text in (("METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n"), ("RECORD", ""))
    },
}


def environment(folder: Path) -> Path:
    """Make a virtual environment with the double as both engines; return its interpreter's path."""
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / f"python{version}" / "site-packages"
    for name, text in _FILES.items():
        file = site / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    shutil.copytree(PROGRAMS / "engine_double", site / "engine_double")
    shutil.copy(PROGRAMS / "cuda_thread.py", site)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\nversion = {sys.version.split()[0]}\n")
    return folder / "bin" / "python"


def model(folder: Path, seed: int = 1) -> Path:
    """Make a model directory with a valid safetensors file of WEIGHT_BYTES."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Double"]}))
    tensor = {"dtype": "U8", "shape": [WEIGHT_BYTES], "data_offsets": [0, WEIGHT_BYTES]}
    header = json.dumps({"weights": tensor}).encode()
    header += b" " * (-len(header) % 8)
    body = bytes((i * 7 + seed) % 251 for i in range(4096)) * (WEIGHT_BYTES // 4096)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    return folder


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self.path)
        except FileNotFoundError as error:
            self.sock.close()
            raise ConnectionRefusedError(*error.args) from error


def over_unix(path):
    return lambda limit_s: UnixConnection(path, limit_s)


def call(port, method, path, body=None, limit_s=60.0, **headers):
    """Send one request; return its status and decoded answer. `port` may be a function that returns a connection,
    given its time limit.
    """
    if callable(port):
        connection = port(limit_s)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit_s)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        data = response.read()
    try:
        return response.status, json.loads(data)
    except ValueError:
        return response.status, data.decode()


def fill(folder):
    """Leave no byte on the disk of a folder."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


class Started:
    """A running launch: its port, process and log."""

    headers = {}
    """Of each request for a completion."""

    def __init__(self, port, process, log):
        self.port, self.process, self.log = port, process, log

    def complete(self, prompt=PROMPT, **more):
        """Request a completion, again until the port is bound; the proxy holds it until a replica is ready. Return
        the answer.
        """
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        limit = time.monotonic() + 60
        while True:
            try:
                status, answer = call(self.port, "POST", "/v1/completions", body, **self.headers)
                break
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.text()[-3000:]
                assert time.monotonic() < limit
                time.sleep(0.01)
        assert status == 200, (answer, self.text()[-3000:])
        return answer

    def ask(self, prompt=PROMPT, **more):
        """Return the token ids of a completion."""
        return self.complete(prompt, **more)["choices"][0]["token_ids"]

    def facts(self):
        """Return what the double reports about its processes. For one replica only."""
        return call(self.port, "GET", "/facts")[1]

    def status(self):
        """Return the replicas' status, or an empty list before the port is bound."""
        try:
            return call(self.port, "GET", "/-/status")[1]["pools"][0]["replicas"]
        except ConnectionRefusedError:
            assert self.process.poll() is None, self.text()[-3000:]
            return []

    def get(self, path):
        """Return a page's text, or its decoded JSON."""
        return call(self.port, "GET", path)[1]

    def phases(self):
        return [[span["phase"] for span in replica["timeline"]] for replica in self.status()]

    def text(self):
        return self.log.read_text(errors="replace")

    def ours(self):
        """Return quickthaw's own lines of the log."""
        return "\n".join(line for line in self.text().splitlines() if line.startswith(("quickthaw:", "Traceback")))

    def wait_for(self, words, limit_s=30.0, times=1):
        limit = time.monotonic() + limit_s
        while self.text().count(words) < times:
            assert time.monotonic() < limit, self.text()[-3000:]
            time.sleep(0.02)

    def wait_serving(self, limit_s=60.0):
        limit = time.monotonic() + limit_s
        while {replica["phase"] for replica in self.status()} != {"serving"}:
            assert time.monotonic() < limit, self.text()[-3000:]
            time.sleep(0.02)

    def off(self):
        """Why capabilities are off, by their names, as the launch says it."""
        lines = [line.removeprefix("quickthaw: ") for line in self.ours().splitlines() if " off: " in line]
        return dict(line.split(" off: ", 1) for line in lines)

    def stop(self, number=signal.SIGTERM, limit_s=60.0):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(limit_s)


@contextlib.contextmanager
def stopped_at_the_end(started, codes=(0, 143)):
    """Yield a running launch; at the end stop it with SIGTERM, and assert its exit code and that its log has no traceback of ours."""
    try:
        yield started
    except BaseException as error:
        error.add_note(f"the launch ended with {started.process.poll()}, and said:\n{started.text()[-4000:]}")
        raise
    finally:
        code = started.stop()
    assert "Traceback" not in started.ours(), started.text()[-4000:]
    assert code in codes, (code, started.text()[-3000:])


class Rig:
    """One state folder, one model, one engine."""

    def __init__(self, folder, python, engine="sglang"):
        self.folder, self.python, self.engine = folder, python, engine
        self.home = folder / "home"
        self.home.mkdir()
        self.model = model(folder / "model")
        self.watch = Watch(folder)
        self.environment = {}
        self._criu(self.home)

    @staticmethod
    def _criu(home):
        (home / "criu").symlink_to(state_home() / "criu")

    @property
    def library(self):
        return Library(self.home)

    @property
    def name(self):
        """Return the only snapshot's name."""
        (name,) = self.library.names()
        return name

    def fresh_home(self, name="elsewhere"):
        """Use a new state folder that contains only CRIU; return the previous one."""
        before, self.home = self.home, self.folder / name
        self.home.mkdir()
        self._criu(self.home)
        return before

    def env(self, **more):
        env = {
            **os.environ,
            "QUICKTHAW_SHARED_STEP": "1",  # the double does not round, on any processor
            "QUICKTHAW_REHEARSE": "0",  # tests of the first restore need one that was not rehearsed
            **self.watch.environment,
            "QUICKTHAW_HOME": str(self.home),
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": str(REPO),  # set in every run, because it is part of a snapshot's identity
            **self.environment,
            **{name: value for name, value in more.items() if value is not None},
        }
        for name in [name for name, value in more.items() if value is None]:
            env.pop(name, None)
        return env

    def argv(self, *options, arguments=(), words=("launch",), model=None, port=None, program=("-m", "plugin")):
        argv = [sys.executable, *program, *words, *map(str, options)]
        if words == ("launch",):
            flag = "--model-path" if self.engine == "sglang" else "--model"
            argv += ["--engine-python", str(self.python), self.engine, flag, str(model or self.model), *arguments]
        return [*argv, "--host", "127.0.0.1", "--port", str(port)]

    def start(self, *options, prefix=(), cwd=REPO, new_session=False, env=None, port=None, **more):
        port = port or free_port()
        log = self.folder / f"log-{port}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*prefix, *self.argv(*options, port=port, **more)],
                env=self.env(**(env or {})),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=new_session,
            )
        return Started(port, process, log)

    @contextlib.contextmanager
    def running(self, *options, **more):
        """Run a command; at the end stop it with SIGTERM and assert that nothing of it is left."""
        with stopped_at_the_end(self.start(*options, **more)) as started:
            yield started
        assert self.watch.gone() == set()

    def take(self, *options, **more):
        """Cold-start and take a snapshot; return the first answer."""
        with self.running(*options, **more) as started:
            answer = started.ask()
            started.wait_serving()
            assert "snapshotted" in started.text() or self.library.names(), started.text()[-3000:]
        return answer

    def cli(self, *words, limit_s=60.0, prefix=(), **env):
        """Run another command to its end."""
        return subprocess.run(
            [*prefix, sys.executable, "-m", "plugin", *map(str, words)],
            env=self.env(**env),
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def doctor(self, prefix=()):
        """What doctor says is off: each finding in one line."""
        result = self.cli("doctor", "--json", prefix=prefix)
        assert "Traceback" not in result.stderr, result.stderr
        found = json.loads(result.stdout)
        assert result.returncode == (3 if any(finding["state"] == "off" for finding in found) else 0)
        return [f"{one['detail']}; {one['remedy']}" for one in found if one["state"] == "off"]
