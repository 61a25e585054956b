"""deploy/container/seccomp.json is in the form that podman, docker, and a kubelet's Localhost profiles read alike."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

PROFILE = json.loads((Path(__file__).parents[3] / "deploy" / "container" / "seccomp.json").read_text())


def names(action):
    return {name for rule in PROFILE["syscalls"] if rule["action"] == action for name in rule["names"]}


def test_it_is_a_list_without_conditions():
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {key for rule in PROFILE["syscalls"] for key in rule} == {"action", "names", "errnoRet"}
    assert names("SCMP_ACT_ALLOW") & names("SCMP_ACT_ERRNO") == set()


def test_it_allows_what_a_restore_needs_and_nothing_that_changes_the_host():
    assert {
        "setns",
        "unshare",
        "mount",
        "ptrace",
        "kcmp",
        "userfaultfd",
        "seccomp",
        "vmsplice",  # data in pipes
        "pidfd_open",
    } <= names("SCMP_ACT_ALLOW")
    dangerous = {
        "io_uring_setup",
        "bpf",
        "init_module",
        "kexec_load",
        "reboot",
        "swapon",
        "keyctl",
        "open_by_handle_at",
    }
    assert names("SCMP_ACT_ALLOW") & dangerous == set()
