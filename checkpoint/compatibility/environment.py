"""Classify environment variables by their effect on a snapshot: every variable matters, except those listed here.

There are three kinds. A variable that MATTERS was, or may have been, read into the engine's memory; another value
makes it another launch. A RENEWED variable says where, for whom and in which session the engine runs; a restored
engine gets this launch's value. A KEPT variable does not affect answers, because quickthaw takes over its function
or it only changes logs; a restored engine keeps the old value.

The rule is one-sided: an unlisted variable matters, so a gap in the lists costs a cold start but never gives a wrong
answer. A pattern (`POD_*`) never covers a name that the engine itself declares (engine.declared_variables).
docs/identity.md has the full list.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

OURS = "QUICKTHAW_"
"""Prefix of quickthaw's own variables, which no engine reads."""

KEPT = frozenset(
    {
        # Ports and addresses: the sandbox has its own network with only a loopback interface.
        "VLLM_HOST_IP", "VLLM_LOOPBACK_IP", "VLLM_PORT", "VLLM_DP_MASTER_IP", "VLLM_DP_MASTER_PORT",
        "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_RPC_BASE_PATH",
        "SGLANG_HOST_IP", "SGLANG_PORT", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "GLOO_SOCKET_IFNAME",
        # Folders for caches and temporary files: the sandbox has its own.
        "TMPDIR", "TMP", "TEMP", "VLLM_CACHE_ROOT", "VLLM_ASSETS_CACHE", "VLLM_MEDIA_CACHE", "VLLM_XLA_CACHE_PATH",
        "PROMETHEUS_MULTIPROC_DIR",
        "SGLANG_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "OUTLINES_CACHE_DIR",
        "FLASHINFER_WORKSPACE_BASE", "FLASHINFER_WORKSPACE_DIR", "FLASHINFER_CACHE_DIR", "NUMBA_CACHE_DIR", "CUDA_CACHE_PATH",
        # Logs, progress, and usage statistics.
        "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_PREFIX", "VLLM_LOGGING_COLOR", "VLLM_LOGGING_STREAM", "VLLM_LOG_STATS_INTERVAL",
        "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK", "VLLM_USAGE_SOURCE", "VLLM_USAGE_STATS_SERVER",
        "VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_DISABLE_LOG_LOGO", "SGLANG_LOGGING_CONFIG_PATH",
        "TORCH_LOGS", "TORCH_SHOW_CPP_STACKTRACES", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_HUB_DISABLE_TELEMETRY", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NO_COLOR", "FORCE_COLOR",
        "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS", "PYTHONFAULTHANDLER",
        "PYTHONSTARTUP", "PYTHONHISTFILE", "OMP_DISPLAY_ENV", "OMP_DISPLAY_AFFINITY", "KMP_SETTINGS", "KMP_WARNINGS",
        "MKL_VERBOSE", "DNNL_VERBOSE", "ONEDNN_VERBOSE", "LD_DEBUG", "LD_DEBUG_OUTPUT", "RUST_BACKTRACE",
        # Device numbers: the GPUs are compared by model and memory.
        "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
        # Container image metadata.
        "VLLM_BUILD_COMMIT", "VLLM_BUILD_PIPELINE", "VLLM_BUILD_URL", "VLLM_IMAGE_TAG", "CUDA_VERSION", "NCCL_VERSION",
        "PYTHON_VERSION", "PYTHON_SHA256", "PYTHON_PIP_VERSION",
    }
)  # fmt: skip

RENEWED = frozenset(
    {
        # Where the engine runs.
        "HOSTNAME", "HOST_IP", "NODE_NAME", "NODE_IP", "NAMESPACE", "CONTAINER_NAME", "container",
        # Who started it, and from which session.
        "_", "PWD", "OLDPWD", "SHLVL", "SHELL", "USER", "LOGNAME", "USERNAME", "MAIL", "PATH", "PS1", "PS2", "PS4", "PROMPT_COMMAND",
        "TERM", "TERMINFO", "COLORTERM", "COLUMNS", "LINES", "LS_COLORS", "PAGER", "MANPAGER", "EDITOR", "VISUAL",
        "DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "WINDOWID", "DESKTOP_SESSION", "DBUS_SESSION_BUS_ADDRESS",
        "XDG_RUNTIME_DIR", "XDG_SEAT", "XDG_VTNR", "XDG_CURRENT_DESKTOP", "XDG_DATA_DIRS",
        "TMUX", "TMUX_PANE", "STY", "WINDOW", "GPG_AGENT_INFO", "GPG_TTY", "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT",
        "TMUX_TMPDIR", "ZELLIJ", "ZELLIJ_PANE_ID", "ZELLIJ_SESSION_NAME", "TERMCAP", "INSIDE_EMACS", "SESSION_MANAGER", "GDMSESSION",
        "MANPATH", "INFOPATH", "DEBIAN_FRONTEND",
        # Tools that run a command: make, test runners, environment managers, container clients. No engine computes by these.
        "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKE_TERMOUT", "MAKE_TERMERR", "MAKEOVERRIDES", "MAKE_RESTARTS", "GNUMAKEFLAGS",
        "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_ADDOPTS", "NOX_CURRENT_SESSION",
        "CONDA_PROMPT_MODIFIER", "CONDA_SHLVL", "CONDA_DEFAULT_ENV", "CONDA_PYTHON_EXE", "_CE_CONDA", "_CE_M", "MAMBA_EXE",
        "MAMBA_ROOT_PREFIX", "UV", "INIT_CWD", "IN_NIX_SHELL", "NIX_BUILD_TOP", "NIX_STORE", "NIX_LOG_FD", "NIX_PROFILES",
        "LOADEDMODULES", "_LMFILES_", "MODULEPATH", "MODULESHOME",
        "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT", "DOCKER_BUILDKIT", "COMPOSE_PROJECT_NAME", "KUBECONFIG",
        "PARALLEL_SEQ", "PARALLEL_PID", "PARALLEL_JOBSLOT",
        # Service managers.
        "INVOCATION_ID", "JOURNAL_STREAM", "NOTIFY_SOCKET", "MAINPID", "MAINPIDFDID", "MANAGERPID", "MANAGERPIDFDID", "SYSTEMD_EXEC_PID",
        "CREDENTIALS_DIRECTORY", "PIDFILE", "FDSTORE", "LOG_NAMESPACE", "TRIGGER_UNIT", "TRIGGER_PATH",
        "TRIGGER_TIMER_REALTIME_USEC", "TRIGGER_TIMER_MONOTONIC_USEC", "MAILTO", "MAILFROM", "CRON_TZ",
        # Proxies, which a sandbox cannot reach, and tokens: read on use.
        "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
    }
)  # fmt: skip

RENEWED_PREFIXES = (
    "POD_", "MY_POD_", "MY_NODE_", "KUBERNETES_", "K8S_", "NOMAD_", "ECS_", "SLURM_",
    "AWS_", "AZURE_", "GOOGLE_", "CLOUDSDK_",
    "SSH_", "SUDO_", "XDG_SESSION_", "TERM_", "LC_TERMINAL", "VTE_", "KONSOLE_", "ITERM_", "KITTY_", "ALACRITTY_", "WEZTERM_", "WT_",
    "VSCODE_", "GNOME_", "KDE_", "LESS", "HIST", "LISTEN_", "WATCHDOG_", "MEMORY_PRESSURE_",
    "GITHUB_", "GITLAB_", "RUNNER_", "BUILDKITE_", "CI_JOB_", "CI_PIPELINE_", "CI_COMMIT_",
    "PIP_", "UV_", "PYENV_", "NVM_", "NPM_", "npm_", "RUSTUP_", "CARGO_", "GIT_",
    "PYTEST_XDIST_", "TOX_", "POETRY_", "PIPENV_", "PDM_", "HATCH_", "ASDF_", "MISE_", "__MISE_", "DIRENV_", "CONDA_PREFIX_",
    "LMOD_", "__LMOD_", "SUPERVISOR_",
)  # fmt: skip
RENEWED_SUFFIXES = ("_SERVICE_HOST", "_SERVICE_PORT")
"""Suffixes of variables that Kubernetes adds for each service; so are the next patterns."""
_SERVICE_PORT = "_SERVICE_PORT_"
_LINKED_PORT, _LINK_SUFFIXES = "_PORT", ("_TCP", "_UDP", "_SCTP", "_ADDR", "_PORT", "_PROTO")
_LINK_VALUES = ("tcp://", "udp://", "sctp://")


@dataclass(frozen=True)
class Variables:
    """An environment by kind; values as given, including secrets."""

    relevant: Mapping[str, str]
    renewed: Mapping[str, str]


def classify(
    environment: Mapping[str, str],
    engine: str = "",
    declared: Callable[[Collection[str]], Collection[str] | None] = lambda names: (),
) -> Variables:
    """Classify an engine's environment.

    `declared` returns which of the pattern-matched names the engine declares; None: unknown.
    """
    relevant: dict[str, str] = {}
    renewed: dict[str, str] = {}
    matched: dict[str, str] = {}
    for name in sorted(environment):
        value = environment[name]
        if name in KEPT or name.startswith(OURS):
            continue
        if name in RENEWED or _is_service_link(name, value):
            renewed[name] = value
        elif _matches(name, value):
            matched[name] = value
        else:
            relevant[name] = value
    if matched:
        names = declared(matched)
        for name, value in matched.items():
            # If the engine's list cannot be read, names with its prefix count as declared.
            own = name.startswith(f"{engine.upper()}_") if names is None else name in names
            (relevant if own else renewed)[name] = value
    return Variables(relevant, renewed)


def _matches(name: str, value: str) -> bool:
    """Return whether a pattern of renewed variables matches: RENEWED_PREFIXES, RENEWED_SUFFIXES, a service's named port."""
    return name.startswith(RENEWED_PREFIXES) or name.endswith(RENEWED_SUFFIXES) or _SERVICE_PORT in name


def _is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes has set this for a service (`X_PORT=tcp://…`, `X_PORT_80_TCP_ADDR`), whatever an engine declares."""
    if name.endswith(_LINKED_PORT) and value.startswith(_LINK_VALUES):
        return True
    _, linked, rest = name.rpartition(f"{_LINKED_PORT}_")
    return bool(linked) and rest[:1].isdigit() and name.endswith(_LINK_SUFFIXES)
