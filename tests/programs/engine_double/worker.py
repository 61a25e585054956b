"""The second process: the model, the KV cache, the compiled code, and the generation."""

import contextlib
import json
import mmap
import os
import random
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import torch

from .launch import GPU, load_plugins, model_folder, other_kind, values

KV_BYTES = 24 << 20
BACKUP_BYTES = 32 << 20
"""Pinned host memory that a sleep of level 1 copies the GPU's weights to."""


def tensors_of(data):
    """Return the tensors of a safetensors file, fused into one as the engines' layers are; of other bytes, all."""
    try:
        length = int.from_bytes(data[:8], "little")
        spans = [tensor["data_offsets"] for tensor in json.loads(data[8 : 8 + length]).values()]
    except (ValueError, LookupError, TypeError, AttributeError):
        return data
    return b"".join(data[8 + length + start : 8 + length + end] for start, end in reversed(spans))


def read_weights(model):
    """Read the model's weight files into anonymous memory, each as one tensor."""
    found = []
    for file in [Path(model)] if os.path.isfile(model) else sorted(Path(model).glob("*.safetensors")):
        data = tensors_of(file.read_bytes())
        memory = mmap.mmap(-1, len(data))
        memory[:] = data
        found.append(torch.Tensor(memory))
    return found


class Model:
    def __init__(self, path):
        self.path = model_folder(path)
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
    """The KV cache, filled with data, so that a snapshot that fails to drop it becomes larger."""

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
    """The second process: the model, the cache, and which of them are asleep."""

    def __init__(self, engine, options):
        self.engine, self.model_runner = engine, Runner(options["model"])
        self.generates = not other_kind(options)
        self.sleeps = GPU and {"enable-sleep-mode", "enable-memory-saver"} & options.keys()
        self.away, self.backup = set(), None
        self.calls = []
        self.tp_worker = self.token_to_kv_pool_allocator = self
        self.armed = None
        self.fired_at = None
        self.model_name = options.get("served-model-name", options["model"])
        self.draft = bytearray(os.urandom(4096)) if "speculative-config" in options else bytearray()
        self.keeps_draft = options.get("sleep-preserve-parameter-names") == "draft.*"
        load_plugins(engine)
        if "random-seed" in options or "seed" in options:
            random.seed(7)
            torch.default_generator.manual_seed(7)
        if os.environ.get("ENGINE_DOUBLE_ARM_S"):
            self.arm(float(os.environ["ENGINE_DOUBLE_ARM_S"]))
        self.busy_flushes = int(os.environ.get("ENGINE_DOUBLE_BUSY_FLUSHES", "0"))

    def get_kvcache(self):
        return self.model_runner.pool

    # Called by name, as in the two engines

    def flush_cache(self):
        from sglang.srt.plugins.hook_registry import HookRegistry

        self.busy_flushes -= 1  # as SGLang in the moment after a request's answer
        return self.busy_flushes < 0 and HookRegistry.after("flush_cache", True, self)

    def collective_rpc(self, method):
        from vllm.v1.worker.worker_base import WorkerBase

        if method.endswith("reload_weights"):
            self.require_awake("weights")
        if method == "reload_weights":
            return self.reload_weights()
        return getattr(WorkerBase, method)(self)

    def reload_weights(self):
        self.calls.append(["own_reload"])
        self.model_runner.model.reload()

    def collective_reload(self, path):
        """Implement SGLang's update_weights_from_disk."""
        from sglang.srt.plugins.hook_registry import HookRegistry

        HookRegistry.around("update_weights_from_disk", Worker.own_update, self, path)

    def own_update(self, path):
        self.calls.append(["own_reload"])
        if model_folder(path) != self.model_runner.model.path:
            raise RuntimeError(f"{path} is not the path that the engine was started with")
        self.model_runner.model.reload()

    def require_awake(self, what):
        if what in self.away:
            raise RuntimeError(f"{what} is not on the device")

    def release(self, tags):
        if not GPU or self.away & set(tags):
            os._exit(7)  # as SGLang's scheduler does
        self.away |= set(tags)
        for what in tags:
            if what == "weights" and self.sleeps:  # without its memory saver SGLang only records the request
                for tensor in self.model_runner.model.tensors:
                    tensor.memory[:] = bytes(len(tensor.memory))

    def resume(self, tags):
        if not set(tags) <= self.away:
            os._exit(7)  # a redundant resume ends SGLang's scheduler
        self.away -= set(tags)

    def sleep(self, level):
        """Sleep as vLLM does: drop the KV cache, and offload (1) or drop (2) the weights."""
        if not GPU:
            return
        if not self.sleeps:
            raise RuntimeError("Sleep mode is not enabled")
        if level == 2:
            self.release(["weights", "kv_cache"])
            if not self.keeps_draft:  # nor does its reload read it again
                self.draft[:] = bytes(len(self.draft))
        else:
            self.backup = self.backup or torch.HostCache.pin(BACKUP_BYTES)
            self.away |= {"weights", "kv_cache"}

    def wake_up(self, tags):
        self.away -= set(tags or ["weights", "kv_cache"])
        if self.backup and "weights" not in self.away:
            torch.HostCache.free.append(self.backup)
            self.backup = None

    def numbers(self, prompt, count):
        """Return numbers as a function of weights and prompt, with the noise of another batch. POD_SPOILED: those of
        lost weights.
        """
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
        # After a trim the KV cache reads as zeros; write to it as a prefill does.
        self.model_runner.pool.k_buffer[0].memory[:8] = b"prefilled"[:8]
        if temperature:
            draw = random.Random(torch.default_generator.state)
            torch.default_generator.state = draw.getrandbits(62)
            return [draw.randrange(50000) for _ in range(tokens)]
        seed = zlib.crc32(str(prompt).encode(), self.model_runner.model.digest())
        draw = random.Random(seed)
        found = [draw.randrange(50000) for _ in range(tokens)]
        # POD_STALE_GRAPHS: replays of a captured graph read what an earlier one wrote to memory that is not there any more.
        return found[:2] + [0] * len(found[2:]) if "POD_STALE_GRAPHS" in os.environ else found

    # Called by tests

    def facts(self):
        return {
            "random": random.random(),
            "torch": torch.default_generator.state,
            "pid": os.getpid(),
            "calls": self.calls,
            "away": sorted(self.away),
            "draft": zlib.crc32(self.draft) if any(self.draft) else 0,
            "fired": self.fired_at,
            "environment": sorted(os.environ),
            "values": values(),
            "all_values": sorted(os.environ.values()),
            "argv": sys.argv,
        }

    def spoil(self):
        """Damage the weights, as an incomplete reload does."""
        self.model_runner.model.tensors[0].memory[:8] = bytes(8)
        return True

    def arm(self, seconds):
        """Set a time-out on the monotonic clock, as engines do."""
        due = time.monotonic() + seconds

        def wait():
            while time.monotonic() < due:
                time.sleep(0.01)
            self.fired_at = time.monotonic()

        threading.Thread(target=wait, daemon=True).start()

    def serve(self, sock):
        file = sock.makefile("rwb")
        # The worker ends silently with its server: tests check quickthaw's messages only.
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


def compile_once():
    """Compile as torch.compile does: read the result from the cache, or make and store it; map it in both cases."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # the cache is unusable: compile without it, as the engine alone does
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
