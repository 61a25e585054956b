"""Which environment variables change a launch's identity, which are renewed in a restored engine, and which are ignored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.compatibility import check as identity
from checkpoint.compatibility.check import CurrentIdentity, check, current_identity
from checkpoint.compatibility.engine import declared_variables
from checkpoint.compatibility.environment import KEPT, RENEWED, classify
from tests.t0.checkpoint.compatibility.test_facts import venv

pytestmark = pytest.mark.t0

KUBERNETES = {
    "HOSTNAME": "pod-7",
    "POD_IP": "10.1.2.3",
    "KUBERNETES_PORT": "tcp://10.0.0.1:443",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "REDIS_SERVICE_HOST": "10.0.0.2",
    "REDIS_SERVICE_PORT": "6379",
    "REDIS_SERVICE_PORT_TLS": "6380",
    "REDIS_PORT": "tcp://10.0.0.2:6379",
    "REDIS_PORT_6379_TCP": "tcp://10.0.0.2:6379",
    "REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
    "REDIS_PORT_6379_TCP_PROTO": "tcp",
}
SESSION = {"PWD": "/srv", "SSH_CONNECTION": "1.2.3.4 5", "TERM": "xterm", "XDG_SESSION_ID": "3", "_": "/usr/bin/env"}
TOOLS = {
    "make": "MAKEFLAGS MAKELEVEL MFLAGS MAKE_TERMOUT MAKE_TERMERR",
    "systemd": "INVOCATION_ID JOURNAL_STREAM NOTIFY_SOCKET SYSTEMD_EXEC_PID MANAGERPIDFDID TRIGGER_UNIT LISTEN_FDS WATCHDOG_USEC",
    "cron": "SHELL LOGNAME MAILTO",
    "tox": "TOX_ENV_NAME TOX_WORK_DIR VIRTUAL_ENV",
    "pytest": "PYTEST_CURRENT_TEST PYTEST_VERSION PYTEST_XDIST_WORKER PYTEST_XDIST_WORKER_COUNT PYTEST_XDIST_TESTRUNUID",
    "nix-shell": "IN_NIX_SHELL NIX_BUILD_TOP NIX_STORE",
    "direnv": "DIRENV_DIR DIRENV_DIFF DIRENV_WATCHES",
    "tmux": "TMUX TMUX_PANE TERM_PROGRAM TMUX_TMPDIR",
    "docker": "HOSTNAME TERM DOCKER_HOST",
    "podman": "container HOSTNAME",
    "kubectl": "KUBECONFIG KUBERNETES_PORT",
    "conda": "CONDA_DEFAULT_ENV CONDA_SHLVL CONDA_PREFIX_1 CONDA_PYTHON_EXE _CE_M _CE_CONDA",
    "uv": "UV UV_RUN_RECURSION_DEPTH VIRTUAL_ENV VIRTUAL_ENV_PROMPT",
    "poetry": "POETRY_ACTIVE",
    "npm": "npm_lifecycle_event npm_config_cache npm_execpath INIT_CWD",
    "asdf": "ASDF_DIR ASDF_DATA_DIR",
    "mise": "MISE_SHELL __MISE_DIFF __MISE_SESSION __MISE_ORIG_PATH",
}
"""What tools that start commands set for them."""
MATTER = {
    "CONDA_PREFIX": "/opt/conda",
    "LD_LIBRARY_PATH": "/l",
    "NIX_LDFLAGS": "-L/n",
    "TRIGGER_WORD": "w",
    "DISABLE_OPENAPI_DOC": "1",
    "MY_TOKEN": "hunter2",
    "ANYTHING": "x",
    "HOME": "/root",
    "LANG": "C",
    "LD_PRELOAD": "/x.so",
    "OMP_NUM_THREADS": "2",
    "PYTHONHASHSEED": "0",
    "TRITON_OVERRIDE_DIR": "/o",
    "MASTER_PORT": "29500",
    "REDIS_PORT": "6379",
    "XDG_CONFIG_HOME": "/c",
}


def test_unknown_variables_are_relevant() -> None:
    assert classify(MATTER).relevant == MATTER
    assert classify(MATTER).renewed == {}


def test_variables_of_the_place_and_session_are_renewed() -> None:
    found = classify(KUBERNETES | SESSION)
    assert found.renewed == KUBERNETES | SESSION
    assert found.relevant == {}


@pytest.mark.parametrize("tool", TOOLS)
def test_variables_of_the_tool_that_started_the_command_are_renewed(tool: str) -> None:
    given = dict.fromkeys(TOOLS[tool].split(), "x")
    assert (classify(given).relevant, classify(given).renewed) == ({}, given)


def test_variables_that_quickthaw_replaces_are_ignored() -> None:
    found = classify({"VLLM_PORT": "5", "TMPDIR": "/t", "VLLM_LOGGING_LEVEL": "DEBUG", "QUICKTHAW_TOKEN": "t"})
    assert (found.relevant, found.renewed) == ({}, {})


@given(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789", min_size=1, max_size=12), st.text(max_size=8))
def test_each_variable_has_one_kind_and_unknown_ones_are_relevant(name: str, value: str) -> None:
    found = classify({f"X{name}": value})
    assert len(found.relevant) + len(found.renewed) <= 1
    # A service name that resembles a path must not change how unlisted names are classified.
    if not name.endswith(("_HOST", "_PORT", "_TCP", "_UDP", "_SCTP", "_ADDR", "_PROTO")) and "_PORT_" not in name:
        assert found.relevant == {f"X{name}": value} or f"X{name}".startswith("XDG_SESSION_")


def test_no_name_is_on_two_lists() -> None:
    assert not KEPT & RENEWED


def test_a_pattern_never_matches_the_engines_declared_variables(tmp_path: Path) -> None:
    declarations = tmp_path / "sglang/srt/environ.py"
    declarations.parent.mkdir(parents=True)
    declarations.write_text("class Envs:\n    MY_POD_MODE = EnvStr(None)\n    SLURM_AWARE = EnvBool(False)\n")
    names = {"MY_POD_MODE": "a", "MY_POD_IP": "b", "SLURM_AWARE": "1", "SLURM_JOB_ID": "2"}
    found = classify(names, "sglang", lambda few: declared_variables("sglang", [tmp_path], few))
    assert set(found.relevant) == {"MY_POD_MODE", "SLURM_AWARE"}
    many = names | {f"POD_{i}": "" for i in range(100)}
    found = classify(many, "sglang", lambda all_: declared_variables("sglang", [tmp_path], all_))
    assert set(found.relevant) == {"MY_POD_MODE", "SLURM_AWARE"}


def test_without_the_engines_list_its_prefix_is_never_matched_by_a_pattern() -> None:
    found = classify({"VLLM_SERVICE_HOST": "h", "REDIS_SERVICE_HOST": "h"}, "vllm", lambda _: None)
    assert (set(found.relevant), set(found.renewed)) == ({"VLLM_SERVICE_HOST"}, {"REDIS_SERVICE_HOST"})


def test_a_service_named_like_an_engine_changes_no_identity(tmp_path: Path) -> None:
    declarations = tmp_path / "sglang/srt/environ.py"
    declarations.parent.mkdir(parents=True)
    declarations.write_text("    SGLANG_GRPC_PORT = EnvInt(None)\n")
    services = {
        "SGLANG_LLAMA_SERVICE_HOST": "10.0.0.9",
        "SGLANG_LLAMA_SERVICE_PORT": "80",
        "SGLANG_LLAMA_SERVICE_PORT_HTTP": "80",
        "SGLANG_LLAMA_PORT": "tcp://10.0.0.9:80",
        "SGLANG_LLAMA_PORT_80_TCP": "tcp://10.0.0.9:80",
        "SGLANG_LLAMA_PORT_80_TCP_ADDR": "10.0.0.9",
        "SGLANG_GRPC_PORT": "tcp://10.0.0.9:80",
        "VLLM_PORT": "tcp://10.0.0.9:80",
        "VLLM_PORT_80_TCP_PROTO": "tcp",
        "PROMETHEUS_MULTIPROC_DIR": "/tmp/metrics",
    }
    found = classify(services, "sglang", lambda few: declared_variables("sglang", [tmp_path], few))
    assert found.relevant == {}
    ours = classify({"SGLANG_GRPC_PORT": "5000"}, "sglang", lambda _: ())
    assert set(ours.relevant) == {"SGLANG_GRPC_PORT"}


def launch(tmp_path: Path, **environment: str) -> CurrentIdentity:
    interpreter = tmp_path / "venv/bin/python"
    if not interpreter.exists():
        venv(tmp_path / "venv", {"vllm": "0.32.0"}, configuration=f"version = {sys.version.split()[0]}\n")
    return current_identity("vllm", interpreter, ["--model", "/m"], environment, gpus=())


def test_only_names_of_renewed_variables_are_recorded(tmp_path: Path) -> None:
    before = launch(tmp_path, HOSTNAME="pod-7", HF_TOKEN="hf_" + "x" * 30, POD_IP="10.1.2.3", MY_TOKEN="hunter2")
    recorded = before.record()
    assert recorded.renewed == ("HF_TOKEN", "HOSTNAME", "POD_IP")
    text = str(recorded.encode()) + repr(before)
    assert "pod-7" not in text and "hf_x" not in text and "hunter2" not in text
    after = launch(tmp_path, HOSTNAME="pod-8", MY_TOKEN="hunter2")
    assert check(recorded, after) == () and before.key == after.key
    other = launch(tmp_path, HOSTNAME="pod-8", MY_TOKEN="hunter3")
    assert [m.code for m in check(recorded, other)] == ["secret-differs: MY_TOKEN"]
    more = launch(tmp_path, MY_TOKEN="hunter2", DISABLE_OPENAPI_DOC="1")
    assert [m.code for m in check(recorded, more)] == ["environment-differs: DISABLE_OPENAPI_DOC"]


def test_a_file_named_by_a_variable_counts_by_content(tmp_path: Path) -> None:
    library, folder = tmp_path / "hook.so", tmp_path / "tuned"
    library.write_bytes(b"x" * 200_000)
    folder.mkdir()
    (folder / "moe.json").write_text("{}")
    given = {"LD_PRELOAD": f"/lib/other.so {library}", "VLLM_TUNED_CONFIG_FOLDER": str(folder)}
    before = launch(tmp_path, **given)
    assert launch(tmp_path, **given).key == before.key
    library.write_bytes(b"y" * 200_000)
    assert [m.code for m in check(before.record(), launch(tmp_path, **given))] == ["environment-differs: LD_PRELOAD"]
    (folder / "moe.json").write_text('{"block": 1}')
    assert "environment-differs: VLLM_TUNED_CONFIG_FOLDER" in [
        m.code for m in check(before.record(), launch(tmp_path, **given))
    ]


def test_the_hosts_time_zone_is_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "LOCALTIME", tmp_path / "localtime")
    utc = launch(tmp_path)
    (tmp_path / "localtime").write_bytes(b"TZif2...\nUTC0\n")
    assert launch(tmp_path).key == utc.key  # the default where the file is missing
    (tmp_path / "localtime").write_bytes(b"TZif2...\nCET-1CEST,M3.5.0,M10.5.0/3\n")
    berlin = launch(tmp_path)
    assert [m.code for m in check(utc.record(), berlin)] == [f"environment-differs: {tmp_path}/localtime"]
    assert "CET-1CEST" in check(utc.record(), berlin)[0].message
    assert launch(tmp_path, TZ="Asia/Tokyo").environment == {"TZ": "Asia/Tokyo"}  # the file is not read
