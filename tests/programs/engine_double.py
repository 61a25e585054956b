"""A double of an engine: the world's side of a launch, small enough to start in a second. Everything of ours around it is real.

Speaks as much of SGLang's and of vLLM's HTTP interface as quickthaw uses, in two processes (server and worker) that talk over a socket
pair, as
the engines' do. What it generates is a function of the weights it holds in anonymous memory and of the prompt, so weights that were
dropped and not read again, or those of another model, show in its answers; at a temperature it samples with torch's generator. It
"compiles" once
for each cache folder and maps what it compiled. On a "GPU" (ENGINE_DOUBLE_GPU=1) it sleeps and wakes as the engines do: it refuses to
generate while
something is away, and a redundant resume ends SGLang's worker.

Standard library, and the double of torch beside it. tests/kits/launch_rig.py lays it out as an environment of its own.
"""

import asyncio
import atexit
import contextlib
import importlib
import json
import mmap
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import uuid
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path

import torch

NUMBERS = {"embed": ("/v1/embeddings", "embedding"), "classify": ("/classify", "probs"), "reward": ("/pooling", "data")}
"""Path and key of what a vLLM answers that does not generate."""
GPU = os.environ.get("ENGINE_DOUBLE_GPU") == "1"
KV_BYTES = 24 << 20


def read_weights(model):
    """The model's weight files in anonymous memory, as tensors of whole files."""
    found = []
    for file in [Path(model)] if os.path.isfile(model) else sorted(Path(model).glob("*.safetensors")):
        data = file.read_bytes()
        memory = mmap.mmap(-1, len(data))
        memory[:] = data
        found.append(torch.Tensor(memory))
    return found


def found(model):
    """The folder of a model: itself, or a hub name's in the cache, or what a test lets the engine have by itself."""
    if os.path.exists(model) or not os.environ.get("ENGINE_DOUBLE_HUB"):
        return model
    cache = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME')}/hub"
    repo = Path(cache) / f"models--{model.replace('/', '--')}"
    revision = options_of(sys.argv[1:]).get("revision", "main")
    try:
        return str(repo / "snapshots" / (repo / "refs" / revision).read_text())
    except OSError:
        own = os.environ["ENGINE_DOUBLE_HUB"]
        if os.path.isdir(own) and "HF_HUB_OFFLINE" not in os.environ:
            return own
        print(f"engine double: no model {model}", flush=True)
        sys.exit(3)


def other_kind(options):
    """What the engine does in place of generating ("" if it generates)."""
    if options.get("runner") == "pooling":
        return options["convert"]
    return "embed" if "is-embedding" in options else "transcribe" if options.get("task") == "transcription" else ""


class Model:
    def __init__(self, path):
        self.path = found(path)
        self.tensors = read_weights(self.path)

    def modules(self):
        return [self]

    def parameters(self):
        return iter(self.tensors)

    def reload(self):
        for tensor, fresh in zip(self.tensors, read_weights(self.path), strict=True):
            tensor.memory[:] = fresh.memory[:]

    def digest(self):
        value = 0
        for tensor in self.tensors:
            value = zlib.crc32(tensor.memory, value)
        return value


class Pool:
    """The KV cache: filled, so that whoever forgets to drop it carries it."""

    def __init__(self):
        memory = mmap.mmap(-1, KV_BYTES)
        memory[:] = os.urandom(1 << 20) * (KV_BYTES >> 20)
        self.k_buffer = [torch.Tensor(memory)]


class Runner:
    def __init__(self, path):
        self.model, self.pool = Model(path), Pool()
        self.kv_caches = self.pool.k_buffer

    def get_model(self):
        return self.model


class Worker:
    """The second process: the model, the cache, and what is asleep of them."""

    def __init__(self, engine, options):
        self.engine, self.model_runner = engine, Runner(options["model"])
        self.generates = not other_kind(options)
        self.sleeps = GPU and {"enable-sleep-mode", "enable-memory-saver"} & options.keys()
        self.away = set()
        self.calls = []
        self.tp_worker = self.token_to_kv_pool_allocator = self
        self.armed = None
        self.fired_at = None
        self.model_name = options.get("served-model-name", options["model"])
        load_plugins(engine)
        if "random-seed" in options or "seed" in options:
            random.seed(7)
            torch.default_generator.manual_seed(7)
        if os.environ.get("ENGINE_DOUBLE_ARM_S"):
            self.arm(float(os.environ["ENGINE_DOUBLE_ARM_S"]))

    def get_kvcache(self):
        return self.model_runner.pool

    # What the two engines call by name

    def flush_cache(self):
        from sglang.srt.plugins.hook_registry import HookRegistry

        return HookRegistry.after("flush_cache", True, self)

    def collective_rpc(self, method):
        from vllm.v1.worker.worker_base import WorkerBase

        if method == "reload_weights":
            self.require_awake("weights")
            return self.model_runner.model.reload()
        return getattr(WorkerBase, method)(self)

    def require_awake(self, what):
        if what in self.away:
            raise RuntimeError(f"{what} is not on the device")

    def release(self, tags):
        if not GPU or self.away & set(tags):
            os._exit(7)  # as SGLang's scheduler does
        self.away |= set(tags)
        for what in tags:
            if what == "weights" and self.sleeps:  # without its memory saver SGLang only takes a note
                for tensor in self.model_runner.model.tensors:
                    tensor.memory[:] = bytes(len(tensor.memory))

    def resume(self, tags):
        if not set(tags) <= self.away:
            os._exit(7)  # a redundant resume ends SGLang's scheduler
        self.away -= set(tags)

    def sleep(self, level):
        """vLLM's: the KV cache goes, the weights go to the host (1) or go (2)."""
        if not GPU:
            return
        if not self.sleeps:
            raise RuntimeError("Sleep mode is not enabled")
        if level == 2:
            self.release(["weights", "kv_cache"])
        else:
            self.away |= {"weights", "kv_cache"}

    def wake_up(self, tags):
        self.away -= set(tags or ["weights", "kv_cache"])

    def numbers(self, prompt, count):
        """Numbers as a function of weights and prompt, with the noise of another batch; POD_SPOILED: of lost weights."""
        if "POD_SPOILED" in os.environ:
            for tensor in self.model_runner.model.tensors:
                tensor.memory[:] = bytes(len(tensor.memory))
        draw = random.Random(zlib.crc32(json.dumps(prompt).encode(), self.model_runner.model.digest()))
        noise = random.SystemRandom()
        return [draw.gauss(0, 1) + noise.gauss(0, 1e-4) for _ in range(count)]

    def generate(self, prompt, tokens, temperature):
        if not self.generates:
            os._exit(8)
        if self.away:
            raise RuntimeError(f"asleep: {sorted(self.away)}")
        # A KV cache that lost its pages is an empty one; this writes as a prefill does.
        self.model_runner.pool.k_buffer[0].memory[:8] = b"prefilled"[:8]
        if temperature:
            draw = random.Random(torch.default_generator.state)
            torch.default_generator.state = draw.getrandbits(62)
            return [draw.randrange(50000) for _ in range(tokens)]
        seed = zlib.crc32(str(prompt).encode(), self.model_runner.model.digest())
        draw = random.Random(seed)
        return [draw.randrange(50000) for _ in range(tokens)]

    # For the tests

    def facts(self):
        return {
            "random": random.random(),
            "torch": torch.default_generator.state,
            "pid": os.getpid(),
            "calls": self.calls,
            "away": sorted(self.away),
            "fired": self.fired_at,
            "environment": sorted(os.environ),
            "values": values(),
            "all_values": sorted(os.environ.values()),
            "argv": sys.argv,
        }

    def arm(self, seconds):
        """A time-out on the monotonic clock, as engines have them."""
        due = time.monotonic() + seconds

        def wait():
            while time.monotonic() < due:
                time.sleep(0.01)
            self.fired_at = time.monotonic()

        threading.Thread(target=wait, daemon=True).start()

    def serve(self, sock):
        file = sock.makefile("rwb")
        # A server that is gone takes its worker with it, without a word: what is tested is what quickthaw says.
        with contextlib.suppress(ConnectionError):
            self._answer(file)

    def _answer(self, file):
        for line in file:
            method, arguments = json.loads(line)
            self.calls.append([method, *arguments]) if method not in ("facts", "generate", "numbers") else None
            try:
                answer = {"result": getattr(self, method)(*arguments)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            file.write(json.dumps(answer).encode() + b"\n")
            file.flush()


def values():
    """Variables as this process has them, and as a program that it starts would."""
    names = ("HOSTNAME", "POD_IP", "HF_TOKEN", "REDIS_SERVICE_HOST", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def load_plugins(engine):
    group = "sglang.srt.plugins" if engine == "sglang" else "vllm.general_plugins"
    for entry in entry_points(group=group):
        entry.load()()


def compile_once():
    """What torch.compile does: found in the cache, or made and kept; mapped either way."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:  # as alone: it compiles for itself
            return map_compiled(Path(folder))
    return map_compiled(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))


def map_compiled(folder):
    kernel = folder / "kernel.so"
    if kernel.exists():
        print("engine double: found its compiled code", flush=True)
    else:
        time.sleep(float(os.environ.get("ENGINE_DOUBLE_COMPILE_S", "0.1")))
        folder.mkdir(parents=True, exist_ok=True)
        kernel.write_bytes(b"\x7fELF" + b"compiled" * 4096)
        print("engine double: compiled", flush=True)
    with kernel.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC, flags=mmap.MAP_PRIVATE)


def options_of(words):
    found, index = {}, 0
    while index < len(words):
        flag, equals, value = words[index].lstrip("-").partition("=")
        index += 1
        if not equals and index < len(words) and not words[index].startswith("-"):
            value, index = words[index], index + 1
        found[flag.replace("model-path", "model")] = value
    if "config" in found:
        lines = Path(found["config"]).read_text().splitlines()
        found = {
            key.replace("model-path", "model"): value for key, _, value in (line.partition(": ") for line in lines)
        } | found
    return found


class Asking:
    """The server's side of the socket pair; one question at a time."""

    def __init__(self, sock):
        self.file, self.lock = sock.makefile("rwb"), threading.Lock()

    def __call__(self, method, *arguments):
        with self.lock:
            self.file.write(json.dumps([method, arguments]).encode() + b"\n")
            self.file.flush()
            line = self.file.readline()
        if not line:
            os._exit(9)  # the engines' servers end with their workers
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


CONTROL = ("/flush_cache", "/update_weights_from_disk", "/release_memory_occupation", "/resume_memory_occupation")


class EngineClient:
    """vLLM's engine client, as far as control goes."""

    def __init__(self, ask):
        self.ask = ask

    async def reset_prefix_cache(self):
        return True

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return [self.ask("collective_rpc", method)]

    async def sleep(self, level=1, mode="abort"):
        self.ask("sleep", level)

    async def wake_up(self, tags=None):
        self.ask("wake_up", tags or [])


def level(query):
    return int(next((p.partition("=")[2] for p in query.split("&") if p.startswith("level=")), "1"))


DEVELOPER = (
    {
        "/reset_prefix_cache": lambda ask, query, body: b"true",
        "/collective_rpc": lambda ask, query, body: str(ask("collective_rpc", body["method"])).encode(),
        "/sleep": lambda ask, query, body: str(ask("sleep", level(query))).encode(),
    }
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    else {}
)
"""What vLLM opens in developer mode."""


def middleware_of(options):
    """The class that `--middleware` names, imported as vLLM does it."""
    if "middleware" not in options:
        return lambda app: app
    module, name = options["middleware"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def handler(engine, ask, options):
    middleware = middleware_of(options)
    # Offline, vLLM puts the cache's folder in the place of a hub name.
    own_name = found(options["model"]) if engine == "vllm" and "HF_HUB_OFFLINE" in os.environ else options["model"]
    name = options.get("served-model-name", own_name)

    def chosen(prompt):
        """What a greedy generation would put after each word of the prompt but the last."""
        words = prompt if isinstance(prompt, list) else prompt.split()
        return [ask("generate", " ".join(map(str, words[:count])), 1, 0)[0] for count in range(1, len(words))]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, body, status=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a request beside a canary that differs is dropped
                self.wfile.write(data)

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/health":
                return self.reply(b"")
            if path == "/v1/models":
                return self.reply({"object": "list", "data": [{"id": name}]})
            if path == "/model_info" and engine == "sglang":
                return self.reply({"is_generation": not other_kind(options)})
            if path == "/facts":
                own = {"random": random.random(), "pid": os.getpid(), "torch": torch.default_generator.state}
                own["values"] = values()
                own["environment"] = sorted(os.environ)
                return self.reply({"server": own, "worker": ask("facts")})
            return self.reply({"error": "not found"}, 404)

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            body = json.loads(text) if text else {}
            path, _, query = self.path.partition("?")
            if "/chat/" in path and os.environ.get("ENGINE_DOUBLE_NO_CHAT"):
                self.close_connection = True
                return
            try:
                self.reply(*self.answer(path, query, body))
            except RuntimeError as error:
                self.reply({"error": str(error)}, 500)

        def answer(self, path, query, body):
            if engine == "sglang" and self.refused(path):
                return ({"error": "Unauthorized"}, 401)
            text = body.get("prompt") or body.get("text") or body.get("input")
            if isinstance(text, str) and "skip-tokenizer-init" in options:
                return ({"error": "no tokenizer: send token ids"}, 400)
            if kind := other_kind(options):
                return self.not_generating(kind, path, query, body)
            if path in ("/v1/completions", "/v1/chat/completions"):
                prompt = body.get("prompt") or json.dumps(body.get("messages"))
                if len(prompt.split() if isinstance(prompt, str) else prompt) > int(options.get("max-model-len", 1024)):
                    return ({"error": "longer than the model's context"}, 400)
                if body.get("slow"):
                    time.sleep(body["slow"])
                ids = ask("generate", prompt, body.get("max_tokens", 16), body.get("temperature", 1.0))
                text = " ".join(map(str, ids))
                choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": "length"}
                if body.get("prompt_logprobs"):
                    choice["prompt_logprobs"] = [
                        None,
                        *({"1": {"rank": 7}, str(i): {"rank": 1}} for i in chosen(prompt)),
                    ]
                return ({"id": f"cmpl-{uuid.uuid4().hex}", "model": name, "choices": [choice]},)
            if path.endswith("/load_lora_adapter"):
                return ({"success": True}, 400 if body.get("lora_name") == "bad" else 200)
            if engine == "sglang":
                return self.sglang(path, body)
            return self.vllm(path, query, body)

        def not_generating(self, kind, path, query, body):
            if engine == "sglang":
                if path == "/encode":
                    return ({"embedding": ask("numbers", body.get("text") or body["input_ids"], 64)},)
                return self.sglang(path, body)
            if path == NUMBERS.get(kind, ("",))[0]:
                found = ask("numbers", body["input"], 64 if kind == "embed" else 3)
                return ({"data": [{NUMBERS[kind][1]: [found] if kind == "reward" else found}]},)
            if path == "/v1/audio/transcriptions" and kind == "transcribe":
                return ({"text": "hello"},)
            return self.vllm(path, query, body)

        def refused(self, path):
            """Whether SGLang asks for another key: its own for what controls it, the clients' for the rest (srt/utils/auth.py)."""
            admin, key = options.get("admin-api-key"), options.get("api-key")
            wanted = (admin or key) if path in CONTROL else key
            return wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}"

        def sglang(self, path, body):
            if path == "/generate":
                sampling, prompt = body["sampling_params"], body.get("text") or body["input_ids"]
                ids = ask("generate", prompt, sampling["max_new_tokens"], sampling["temperature"])
                places = [None, *([[-0.5, i, None]] for i in chosen(prompt))] if body.get("return_logprob") else []
                told = {"input_top_logprobs": places}
                return ({"text": " ".join(map(str, ids)), "output_ids": ids, "meta_info": told},)
            if path == "/flush_cache":
                return (b"", 200 if ask("flush_cache") else 400)
            if path == "/update_weights_from_disk":
                ask("require_awake", "weights")
                ask("collective_reload", body["model_path"])
                return ({"success": True, "message": "ok"},)
            if path in ("/release_memory_occupation", "/resume_memory_occupation"):
                tags = body.get("tags") or ["weights", "kv_cache"]
                ask("release" if path.startswith("/release") else "resume", tags)
                return (b"",)
            return ({"error": "not found"}, 404)

        def vllm(self, path, query, body):
            app = types.SimpleNamespace(state=types.SimpleNamespace(engine_client=EngineClient(ask)))
            sent = []

            async def receive():
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

            async def send(message):
                sent.append(message)

            async def own(scope, receive, send):
                status, data = (200, DEVELOPER[path](ask, query, body)) if path in DEVELOPER else (404, b"not found")
                await send({"type": "http.response.start", "status": status})
                await send({"type": "http.response.body", "body": data})

            headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
            scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": app}
            asyncio.run(middleware(own)(scope, receive, send))
            return (sent[1]["body"], sent[0]["status"])

    return Handler


def collective_reload(self, path):
    if found(path) != self.model_runner.model.path:
        raise RuntimeError(f"{path} is not the path that the engine was started with")
    self.model_runner.model.reload()


Worker.collective_reload = collective_reload


def main(engine):
    options = options_of(sys.argv[1:])
    found(options["model"])
    if name := os.environ.get("ENGINE_DOUBLE_OPENS"):
        # A lock file that stays open, beside the model.
        held = open(Path(options["model"]).parent / name, "w")
        atexit.register(held.close)
    if os.environ.get("ENGINE_DOUBLE_STUBBORN") == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        compiled = compile_once()
        Worker(engine, options).serve(theirs)
        del compiled
        os._exit(0)
    theirs.close()
    load_plugins(engine)
    if "random-seed" in options or "seed" in options:
        random.seed(7)
    ask = Asking(ours)
    ask("facts")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server((options["host"], int(options["port"])), handler(engine, ask, options)) as server:
        server.serve_forever()
