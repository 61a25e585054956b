"""What both processes know of their launch: the engine's options, the model's folder, the environment, the plugins."""

import itertools
import json
import mmap
import os
import signal
import socket
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path

import cuda_thread

GPU = int(os.environ.get("ENGINE_DOUBLE_GPU", "0"))
"""How many processes have a CUDA context: the worker, or the server, too."""
HOST_COPY_BYTES = 32 << 20
"""Memory of a process on a "GPU" that the driver's double fills at a checkpoint (tests/kits/checkpoint/cuda_double.py)."""


def hold_context():
    """Begin to hold a CUDA context."""
    cuda_thread.start(HOST_COPY_BYTES)


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


def model_folder(model):
    """Return the folder of a model: a path, a hub name's folder in the cache, or the one that a test provides."""
    if os.path.exists(model) or not os.environ.get("ENGINE_DOUBLE_HUB"):
        return model
    cache = os.environ.get("HF_HUB_CACHE") or f"{os.environ.get('HF_HOME')}/hub"
    repo = Path(cache) / f"models--{model.replace('/', '--')}"
    revision = options_of(sys.argv[1:]).get("revision", "main")
    if (repo / "snapshots" / revision).is_dir():
        return str(repo / "snapshots" / revision)  # a commit
    try:
        return str(repo / "snapshots" / (repo / "refs" / revision).read_text())
    except OSError:
        own = os.environ["ENGINE_DOUBLE_HUB"]
        if os.path.isdir(own) and "HF_HUB_OFFLINE" not in os.environ:
            return own
        print(f"engine double: no model {model}", flush=True)
        sys.exit(3)


def other_kind(options):
    """Return what the engine does instead of generating, or "" if it generates."""
    if options.get("runner") == "pooling":
        return options["convert"]
    return "embed" if "is-embedding" in options else "transcribe" if options.get("task") == "transcription" else ""


def keys_of(words):
    """The keys that vLLM takes from clients: of the last `--api-key` or of the file, else the variable's."""
    found = None
    for at, word in enumerate(words):
        if word == "--api-key":
            found = list(itertools.takewhile(lambda value: not value.startswith("-"), words[at + 1 :]))
        elif word.startswith("--api-key="):
            found = [word.partition("=")[2]]
    if found is None and (key := options_of(words).get("api-key")):
        found = json.loads(key.replace("'", '"')) if key.startswith("[") else [key]
    return [key for key in (found or [os.environ.get("VLLM_API_KEY")]) if key]


def values():
    """Return the variables that tests compare, as this process has them."""
    names = ("HOSTNAME", "POD_IP", "HF_TOKEN", "REDIS_SERVICE_HOST", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def surroundings():
    """What this process finds out about where it runs, as an engine's code would."""
    return {
        "host": socket.gethostname(),
        "hosts": Path("/etc/hosts").read_text(),
        "resolver": Path("/etc/resolv.conf").read_text(),
        "zone": time.strftime("%Z"),
        "time": time.time(),
        "alarm_s": signal.getitimer(signal.ITIMER_REAL)[0],
        "cpus": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
        "tmp": tempfile.gettempdir(),
        "folders": {name: os.environ[name] for name in FOLDERS if name in os.environ},
    }


FOLDERS = ("TMPDIR", "PROMETHEUS_MULTIPROC_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TRITON_CACHE_DIR")
"""Variables that name folders which engines write to."""


def use_folders():
    """Write to each of these folders, made where it is not there, and keep the metrics' file mapped, as the engines do."""
    for name in FOLDERS:
        if not os.environ.get("ENGINE_DOUBLE_FOLDERS") or name not in os.environ:
            continue
        folder = Path(os.environ[name])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "written").write_bytes(bytes(4096))
        if name == "PROMETHEUS_MULTIPROC_DIR":
            with (folder / "counter.db").open("w+b") as file:
                file.truncate(4096)
                kept.append(mmap.mmap(file.fileno(), 0))


kept = []


def load_plugins(engine):
    group = "sglang.srt.plugins" if engine == "sglang" else "vllm.general_plugins"
    for entry in entry_points(group=group):
        entry.load()()
