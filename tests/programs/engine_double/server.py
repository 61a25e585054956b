"""The first process: the part of either engine's HTTP interface that quickthaw uses."""

import asyncio
import contextlib
import http.client
import importlib
import json
import os
import random
import sys
import threading
import time
import types
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler

import torch

from .launch import keys_of, model_folder, other_kind, surroundings, values

NUMBERS = {"embed": ("/v1/embeddings", "embedding"), "classify": ("/classify", "probs"), "reward": ("/pooling", "data")}
"""Path and key of what a vLLM answers that does not generate."""
CONTROL = ("/flush_cache", "/update_weights_from_disk", "/release_memory_occupation", "/resume_memory_occupation")


class WorkerChannel:
    """The server's end of the socket pair; one request at a time."""

    def __init__(self, sock):
        self.file, self.lock = sock.makefile("rwb"), threading.Lock()

    def __call__(self, method, *arguments):
        with self.lock:
            self.file.write(json.dumps([method, arguments]).encode() + b"\n")
            self.file.flush()
            line = self.file.readline()
        if not line:
            os._exit(9)  # an engine's server ends with its worker
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


class EngineClient:
    """The control methods of vLLM's engine client."""

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


HEALTH_ASKED = []
"""Requests of the health page so far; it answers 503 to the first ENGINE_DOUBLE_HEALTHY_AFTER."""
KEPT = []
"""Connections that stay open, as those of a client's pool do."""


def fetch(url, keep=False):
    """What a URL has, as an engine fetches an image; `keep` leaves the connection open."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    try:
        connection.request("GET", parts.path or "/")
        text = connection.getresponse().read().decode()
    except OSError as error:
        return {"error": type(error).__name__}
    if keep:
        KEPT.append(connection)
    else:
        connection.close()
    return {"text": text}


def fetch_again():
    """Whether each kept connection still works."""
    found = []
    for connection in KEPT:
        try:
            connection.request("GET", "/")
            found.append(connection.getresponse().read().decode())
        except (OSError, http.client.HTTPException) as error:
            found.append(type(error).__name__)
    return found


if "ENGINE_DOUBLE_FETCHES" in os.environ:
    print("engine double: fetched", fetch(os.environ["ENGINE_DOUBLE_FETCHES"], keep=True), flush=True)


def level(query):
    return int(next((p.partition("=")[2] for p in query.split("&") if p.startswith("level=")), "1"))


def tags_of(query):
    return [value for name, _, value in (part.partition("=") for part in query.split("&")) if name == "tags"]


DEVELOPER = (
    {
        "/reset_prefix_cache": lambda ask, query, body: b"true",
        "/collective_rpc": lambda ask, query, body: str(ask("collective_rpc", body["method"])).encode(),
        "/sleep": lambda ask, query, body: str(ask("sleep", level(query))).encode(),
        "/wake_up": lambda ask, query, body: str(ask("wake_up", tags_of(query))).encode(),
    }
    if os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    else {}
)
"""What vLLM opens in developer mode."""


def middleware_of(options):
    """Import the class that `--middleware` names, as vLLM does."""
    if "middleware" not in options:
        return lambda app: app
    module, name = options["middleware"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def handler(engine, ask, options):
    middleware = middleware_of(options)
    keys = keys_of(sys.argv[1:])
    # Offline, vLLM replaces a hub name by the cache's folder.
    own_name = (
        model_folder(options["model"]) if engine == "vllm" and "HF_HUB_OFFLINE" in os.environ else options["model"]
    )
    name = options.get("served-model-name", own_name)

    def greedy_choices(prompt):
        """Return the token that a greedy generation would give after each word of the prompt but the last."""
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
            with contextlib.suppress(
                ConnectionError
            ):  # the connection of a request beside a differing canary is closed
                self.wfile.write(data)

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/health":
                HEALTH_ASKED.append(path)
                late = int(os.environ.get("ENGINE_DOUBLE_HEALTHY_AFTER", "0")) >= len(HEALTH_ASKED)
                return self.reply(b"", 503 if late else 200)
            if path == "/v1/models":
                return self.reply({"object": "list", "data": [{"id": name}]})
            if path == "/model_info" and engine == "sglang":
                return self.reply({"is_generation": not other_kind(options)})
            if path == "/facts":
                own = {"random": random.random(), "pid": os.getpid(), "torch": torch.default_generator.state}
                own["values"] = values()
                own["environment"] = sorted(os.environ)
                own["surroundings"] = surroundings()
                own["health_asked"] = len(HEALTH_ASKED)
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
            if self.refused(path) if engine == "sglang" else path.startswith("/v1") and self.without_key():
                return ({"error": "Unauthorized"}, 401)
            if path == "/spoil":
                return ({"spoilt": ask("spoil")},)
            if path == "/fetch":
                return (fetch(body["url"]) if "url" in body else {"again": fetch_again()},)
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
                        *({"1": {"rank": 7}, str(i): {"rank": 1}} for i in greedy_choices(prompt)),
                    ]
                whole = {"id": f"cmpl-{uuid.uuid4().hex}", "model": name, "choices": [choice]}
                streamed = body.get("stream") and "chat" not in path
                return (b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(whole).encode() if streamed else whole,)
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

        def without_key(self):
            """Whether vLLM asks for one of its keys (entrypoints/serve/middleware/authenticate.py)."""
            return bool(keys) and self.headers.get("Authorization") not in [f"Bearer {key}" for key in keys]

        def refused(self, path):
            """Return whether SGLang requires another key: its admin key for control, the clients' key otherwise
            (srt/utils/auth.py).
            """
            admin, key = options.get("admin-api-key"), options.get("api-key")
            wanted = (admin or key) if path in CONTROL else key
            return wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}"

        def sglang(self, path, body):
            if path == "/generate":
                sampling, prompt = body["sampling_params"], body.get("text") or body["input_ids"]
                ids = ask("generate", prompt, sampling["max_new_tokens"], sampling["temperature"])
                places = (
                    [None, *([[-0.5, i, None]] for i in greedy_choices(prompt))] if body.get("return_logprob") else []
                )
                meta = {"input_top_logprobs": places}
                return ({"text": " ".join(map(str, ids)), "output_ids": ids, "meta_info": meta},)
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
