"""Which of an engine's arguments and environment variables matter to a snapshot, and which look like secrets.

The rule is one-sided: whatever is not listed here as irrelevant matters, so a mistake costs a cold start and never a wrong
answer. An argument is irrelevant when the restored process would serve the same answers to the same clients with the old value,
because quickthaw itself takes its place (host, port) or because it only changes how much is logged. What decides whether the
*content* of requests is logged, or who may send them, matters. docs/identity.md is this module in prose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import blake3

# Flag without dashes → how many values it takes (needed to take it out of the line together with them).
_EVERY_ENGINE = {"host": 1, "port": 1}
IRRELEVANT_ARGUMENTS: dict[str, dict[str, int]] = {
    "vllm": {
        **_EVERY_ENGINE,
        "uvicorn-log-level": 1,
        "max-log-len": 1,
        "disable-uvicorn-access-log": 0,
        "disable-access-log-for-endpoints": 1,
        "aggregate-engine-logging": 0,
    },
    "sglang": {
        **_EVERY_ENGINE,
        "log-level": 1,
        "log-level-http": 1,
        "decode-log-interval": 1,
        "show-time-cost": 0,
        "nccl-port": 1,
        "crash-dump-folder": 1,
    },
}

# Prefixes of names that engines, their frameworks, the loader or the allocator read.
RELEVANT_ENVIRONMENT = (
    "VLLM_", "SGLANG_", "SGL_", "TORCH", "PYTORCH_", "TRITON_", "INDUCTOR_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_",
    "FLASHINFER_", "FLASH_ATTENTION_", "XGRAMMAR_", "OUTLINES_", "TIKTOKEN_", "NUMBA_", "ATEN_", "DNNL_", "ONEDNN_",
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "GLOO_",
    "CUDA_", "CUBLAS", "CUDNN_", "NCCL_", "NVSHMEM_", "NVIDIA_TF32_OVERRIDE",
    "PYTHON", "LD_", "GLIBC_TUNABLES", "MALLOC_", "MIMALLOC_", "JEMALLOC", "TCMALLOC_", "TZ",
)  # fmt: skip

# … and those among them that name a port, an address, a place for caches or logs, a log level, or a device by its index.
IRRELEVANT_ENVIRONMENT = frozenset(
    {
        "VLLM_HOST_IP", "VLLM_LOOPBACK_IP", "VLLM_PORT", "VLLM_DP_MASTER_IP", "VLLM_DP_MASTER_PORT",
        "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_RPC_BASE_PATH",
        "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_ASSETS_CACHE", "VLLM_MEDIA_CACHE", "VLLM_XLA_CACHE_PATH",
        "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR", "VLLM_DEBUG_DUMP_PATH",
        "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_PREFIX", "VLLM_LOGGING_COLOR", "VLLM_LOGGING_STREAM", "VLLM_LOG_STATS_INTERVAL",
        "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "VLLM_USAGE_SOURCE", "VLLM_USAGE_STATS_SERVER",
        "VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_DISABLE_LOG_LOGO", "VLLM_BUILD_COMMIT", "VLLM_BUILD_PIPELINE", "VLLM_BUILD_URL",
        "VLLM_IMAGE_TAG",
        "SGLANG_HOST_IP", "SGLANG_PORT", "SGLANG_CACHE_DIR", "SGLANG_LOGGING_CONFIG_PATH",
        "SGLANG_TORCH_PROFILER_DIR", "VLLM_TORCH_PROFILER_DIR",
        "TORCH_HOME", "TORCH_LOGS", "TORCH_SHOW_CPP_STACKTRACES", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR",
        "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR",
        "TRANSFORMERS_CACHE", "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_OFFLINE", "TIKTOKEN_CACHE_DIR", "OUTLINES_CACHE_DIR",
        "FLASHINFER_WORKSPACE_BASE", "FLASHINFER_WORKSPACE_DIR", "FLASHINFER_CACHE_DIR", "NUMBA_CACHE_DIR",
        "CUDA_VISIBLE_DEVICES", "CUDA_CACHE_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VERSION",
        "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "NCCL_VERSION",
        "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS", "PYTHONFAULTHANDLER",
        "PYTHONSTARTUP", "PYTHONHISTFILE", "PYTHON_VERSION", "PYTHON_SHA256", "PYTHON_PIP_VERSION",
        "OMP_DISPLAY_ENV", "OMP_DISPLAY_AFFINITY", "KMP_SETTINGS", "KMP_WARNINGS", "KMP_VERSION", "MKL_VERBOSE", "DNNL_VERBOSE",
        "ONEDNN_VERBOSE", "LD_DEBUG", "LD_DEBUG_OUTPUT",
    }
)  # fmt: skip

# A secret is known by its name …
_SECRET_WORDS = frozenset(
    (
        *(
            "key",
            "apikey",
            "token",
            "secret",
            "secrets",
            "password",
            "passwd",
            "passphrase",
            "credential",
            "credentials",
        ),
        *("auth", "authorization", "cookie", "dsn", "jwt"),
    )
)
# … (word by word: `MAX_TOKENS` and `TOKENIZERS_…` are none) or, whatever its name, by the form of its value: the vendors' own
# prefixes, a JSON web token, a PEM block, or a password in a URL.
_SECRET_VALUE = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|nvapi-[\w-]{20,}|eyJ[\w-]{8,1000}\.[\w-]{8,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]*:[^/\s:@]+@"
)
_PLAIN_VALUE = re.compile(r"[+-]?[0-9.]{0,9}|true|false|yes|no|on|off|auto|none|null", re.IGNORECASE)
# argparse takes an unambiguous beginning of a flag for the flag.
_SECRET_FLAGS = ("api-key", "admin-api-key", "hf-token", "ssl-keyfile-password")
_MAX_FILE = 1 << 20

Arguments = dict[str, tuple[tuple[str, ...], ...]]
"""Flag with its dashes (`""` for positional words) → the values of each of its occurrences."""


def looks_secret(name: str, value: str) -> bool:
    """Whether the variable or flag should never be shown or stored by its value."""
    if _PLAIN_VALUE.fullmatch(value):
        return False
    words = re.split(r"[-_.]+", name.strip("-").lower())
    if _SECRET_WORDS.intersection(words) or any(len(name) > 4 and f.startswith(name.strip("-")) for f in _SECRET_FLAGS):
        return True
    return bool(_SECRET_VALUE.search(value))


def secret_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the variables that look like secrets, whether they matter or not; for `inspect` and `--scrub-env`."""
    return tuple(sorted(name for name, value in environment.items() if looks_secret(name, value)))


def relevant_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, with their values (secrets included: the caller keeps those apart)."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(RELEVANT_ENVIRONMENT) and name not in IRRELEVANT_ENVIRONMENT
    }


def normalised_arguments(engine: str, arguments: Sequence[str], model_paths: Sequence[str] = ()) -> Arguments:
    """What of an engine's command line matters, independent of the order of flags, of `-` or `_` in them and of `=` or a space.

    `arguments` is what follows the module or the word `serve`. Where a name to serve under is given (`--served-model-name`), values
    equal to one of `model_paths` become `{model}`, since the model then counts by its digest alone; without it the path is the name
    that clients ask for. The path of a file up to 1 MiB becomes a digest of the content, so that an edited chat template or
    configuration file is another launch, and the same file elsewhere is not.
    """
    if not any(word.replace("_", "-").partition("=")[0] == "--served-model-name" for word in arguments):
        model_paths = ()
    irrelevant = IRRELEVANT_ARGUMENTS.get(engine, _EVERY_ENGINE)
    found: dict[str, list[tuple[str, ...]]] = {}
    positional: list[str] = []
    words = list(arguments)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            positional += words[at:]
            break
        if not _is_flag(word):
            positional.append(word)
            continue
        head, equals, attached = word.partition("=")
        flag = head.replace("_", "-") if head.startswith("--") else head
        values = [attached] if equals else []
        takes = irrelevant.get(flag.removeprefix("--"))
        if takes is not None:
            at += 0 if equals else min(takes, len(words) - at)
            continue
        while not equals and at < len(words) and not _is_flag(words[at]):
            values.append(words[at])
            at += 1
        found.setdefault(flag, []).append(tuple(_value(v, model_paths) for v in values))
    if positional:
        found[""] = [tuple(_value(v, model_paths) for v in positional)]
    return {flag: tuple(found[flag]) for flag in sorted(found)}


def _is_flag(word: str) -> bool:
    # A negative number is a value.
    return word.startswith("-") and len(word) > 1 and not re.fullmatch(r"-[0-9.]+(e[+-]?[0-9]+)?", word)


def _value(value: str, model_paths: Sequence[str]) -> str:
    if value in model_paths:
        return "{model}"
    if "/" in value or value.endswith((".json", ".yaml", ".yml", ".jinja")):
        path = Path(value)
        try:
            if path.is_file() and path.stat().st_size <= _MAX_FILE:
                return f"file:{blake3.blake3(path.read_bytes()).hexdigest()[:32]}"
        except (OSError, ValueError):
            # Unreadable, or no path at all (a JSON value longer than a name may be): the word itself is what counts.
            return value
    return value
