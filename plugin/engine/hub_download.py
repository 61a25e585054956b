"""Download the Hugging Face hub repositories of a launch, with the engine's own huggingface_hub.

Run by the engine's interpreter, outside the sandbox and with the user's environment, so that token, mirror, proxies, caches
and progress bars are what they are when the engine downloads for itself. Reads one JSON request from standard input and
writes one JSON answer to standard output; progress goes to standard error.

Request: {"parent": PID, "cache": FOLDER or null, "engine": NAME, "load_format": FORMAT, "remote_code": BOOL,
"code_revision": REVISION or null, "repositories": [{"name", "revision", "part"}]}, where part is `model` (one format of its
weights), `text` (no weights) or `all`. Answer, in the same order: {"folders": [FOLDER, …], "files": [NAMES, …]}, with the files
that the hub says are needed of each (null where only the cache was read); or {"code", "message"} of the first failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.npz")
"""Formats of weights. An engine loads one of them; the others of a repository are not downloaded."""
PREFERRED = ("*.safetensors", "*.bin", "*.pt", "*.pth")
ONE_FORMAT = {
    "safetensors": "*.safetensors",
    "fastsafetensors": "*.safetensors",
    "instanttensor": "*.safetensors",
    "runai_streamer": "*.safetensors",
    "sharded_state": "*.safetensors",
    "mistral": "consolidated*.safetensors",
    "npcache": "*.bin",
    "pt": "*.pt",
}
NOT_READ = (
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "*.mlpackage/*",
    "original/*",
)
"""Files that the engines never read: other frameworks' weights, and the files that a model was converted from."""
ANSWER_LIMIT_S = 10.0
"""Seconds for a hub's first answer; huggingface_hub's own default where it has one."""
INDEX = "model.safetensors.index.json"
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
CODE_ELSEWHERE = re.compile(r"([\w.-]+/[\w.-]+)--[\w.]+")
_PR_SET_PDEATHSIG = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Refused(Exception):
    """A repository cannot be downloaded. Has a stable code, and one line with the remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Download:
    """One request, answered by one version of huggingface_hub."""

    def __init__(self, hub: Any, request: dict[str, Any]) -> None:
        self.hub, self.cache = hub, request["cache"]
        self.engine, self.load_format = request["engine"], request["load_format"]
        self.remote_code, self.code_revision = request["remote_code"], request["code_revision"]
        self.needed: dict[tuple[str, str | None, str], list[str]] = {}
        """The files of each repository that the hub was asked about."""

    def repository(self, name: str, revision: str | None, part: str) -> str:
        """Download one repository as far as its part goes; return its snapshot folder. Raises Refused."""
        try:
            folder = self._newest(name, revision, part)
        except Refused:
            raise
        except Exception as error:  # huggingface_hub raises other classes in each of its versions
            cached = self._cached(name, revision, part)
            if cached is None:
                raise self._refusal(name, revision, error) from error
            folder = cached
        if part == "model":
            self._named_by(name, revision, configurations(folder))
        return folder

    def _named_by(self, name: str, revision: str | None, text: str) -> None:
        """Download the code that a model's configuration names, if it may run. Raises Refused if it names another model."""
        if names_speculators(text):
            raise Refused(
                "hub-speculators", f"the configuration of {name} names another model, which the engine loads too"
            )
        if not self.remote_code:
            return
        if self.code_revision and self.code_revision != revision:
            self.repository(name, self.code_revision, "text")
        for other in sorted(set(CODE_ELSEWHERE.findall(text))):
            self.repository(other, self.code_revision, "text")

    def _newest(self, name: str, revision: str | None, part: str) -> str:
        # By itself huggingface_hub waits without a limit for a hub that accepts connections and does not answer.
        limit_s = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_LIMIT_S)
        info = self.hub.HfApi().model_info(name, revision=revision, timeout=limit_s)
        listed = [file.rfilename for file in info.siblings or ()]
        wanted = listed
        if part != "all":
            listed = [file for file in listed if not _any_of(file, NOT_READ)]
            wanted = [file for file in listed if not _any_of(file, WEIGHTS)]
        if part == "model":
            wanted += self._weights(name, revision, listed)
        patterns = [file.replace("[", "[[]") for file in wanted]
        folder = self.hub.snapshot_download(name, revision=revision, cache_dir=self.cache, allow_patterns=patterns)
        self.needed[name, revision, part] = wanted
        return str(folder)

    def _weights(self, name: str, revision: str | None, listed: list[str]) -> list[str]:
        """Return the weight files that the engine would download by itself."""
        if self.load_format == "dummy":
            return []
        formats = (ONE_FORMAT[self.load_format],) if self.load_format in ONE_FORMAT else PREFERRED
        if self.engine == "vllm" and self.load_format == "auto":
            formats = (ONE_FORMAT["mistral"], *formats)
        for pattern in formats:
            found = [file for file in listed if fnmatch.fnmatchcase(file, pattern)]
            if found and self.engine == "vllm" and pattern == "*.safetensors" and INDEX in listed:
                index = self.hub.hf_hub_download(name, INDEX, revision=revision, cache_dir=self.cache)
                return sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) or found
            if found:
                return found
        if any(file.endswith(".gguf") for file in listed):
            raise Refused(
                "hub-gguf", f"{name} holds GGUF files; only the engine chooses among them, so it downloads its own"
            )
        return []

    def _cached(self, name: str, revision: str | None, part: str) -> str | None:
        """Return the snapshot folder in the cache if it looks complete, else None, for when the hub cannot be reached."""
        try:
            # Ignoring all files makes snapshot_download return the folder even if it is incomplete.
            folder = self.hub.snapshot_download(
                name, revision=revision, cache_dir=self.cache, local_files_only=True, ignore_patterns="*"
            )
            return str(folder) if complete(Path(folder), part) else None
        except (OSError, ValueError):  # not in the cache, or an index there is damaged
            return None

    def _refusal(self, name: str, revision: str | None, error: Exception) -> Refused:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", None)
        number, text = _errno(error), " ".join(str(error).split())[:300]
        where = re.sub(r"//[^/]*@", "//", os.environ.get("HF_ENDPOINT") or "the hub")
        if "GatedRepoError" in kinds or status == 403:
            return Refused(
                "hub-gated", f"{name} is gated at {where}; ask for access there, and set HF_TOKEN to your token"
            )
        if "RevisionNotFoundError" in kinds:
            return Refused("hub-no-revision", f"{name} has no revision {revision} at {where}; see --revision")
        if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds or status in (401, 404):
            return Refused(
                "hub-no-model",
                f"{where} shows no model {name}; check its spelling, and set HF_TOKEN if it is private (a path begins with / or ./)",
            )
        if number in _NO_ROOM or "not enough" in text.lower():
            return Refused(
                "hub-disk-full", f"no room for {name}; make room, or set HF_HOME to a folder on a larger disk"
            )
        if number in _NOT_WRITABLE:
            return Refused(
                "hub-cache-unwritable",
                f"the cache for {name} cannot be written ({text}); set HF_HOME to a writable folder",
            )
        if {
            "OfflineModeIsEnabled",
            "ConnectionError",
            "ConnectError",
            "Timeout",
            "TimeoutException",
            "LocalEntryNotFoundError",
        } & kinds:
            return Refused(
                "hub-unreachable",
                f"{name} is not in the cache and {where} does not answer; check HF_ENDPOINT and HTTPS_PROXY ({text})",
            )
        return Refused(
            "hub-download-failed", f"{name} could not be downloaded from {where}: {type(error).__name__}: {text}"
        )


def complete(folder: Path, part: str) -> bool:
    """Return whether a snapshot folder has a configuration and all weights that its index names, as far as can be seen."""
    if part == "text":
        return any(folder.iterdir())
    if part == "model" and not any((folder / name).is_file() for name in ("config.json", "params.json")):
        return False
    for index in folder.glob("*.index.json"):
        if any(not (folder / file).is_file() for file in json.loads(index.read_text()).get("weight_map", {}).values()):
            return False
    return any(_any_of(file.name, WEIGHTS) and file.is_file() for file in folder.rglob("*"))


def _any_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def configurations(folder: str) -> str:
    """Return the text of the configurations in a model's folder."""
    text = ""
    for name in CONFIGURATIONS:
        with contextlib.suppress(OSError):
            text += (Path(folder) / name).read_text(errors="replace")
    return text


def names_speculators(text: str) -> bool:
    """Return whether a model's configurations name another model that it speculates for."""
    return '"speculators_config"' in text


def _errno(error: BaseException | None) -> int | None:
    """Return the system's error number of an exception or of what caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Download what a request names."""
    try:
        hub = importlib.import_module("huggingface_hub")
        download = Download(hub, request)
        repositories = request["repositories"]
        folders = [download.repository(**repository) for repository in repositories]
        return {
            "folders": folders,
            "files": [download.needed.get((one["name"], one["revision"], one["part"])) for one in repositories],
        }
    except Refused as error:
        return {"code": error.code, "message": error.message}
    except ImportError as error:
        return {
            "code": "hub-no-client",
            "message": f"the engine's interpreter has no huggingface_hub ({error}); install it there",
        }


def main() -> None:
    """Answer the request on standard input; the kernel ends this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.dup(1)
    os.dup2(2, 1)  # all other output goes to standard error
    request = json.loads(sys.stdin.buffer.read())
    if os.getppid() != request["parent"]:
        return  # the parent ended before prctl took effect
    os.write(out, json.dumps(answer(request)).encode())


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's modules must not shadow the engine's
    main()
