"""The scripts of deploy/container/bin where their container fails them, without a container."""

import os
import shutil
import subprocess

import pytest

from tests.kits.launch_rig import REPO

pytestmark = pytest.mark.t1

BIN = REPO / "deploy" / "container" / "bin"


@pytest.fixture
def environment(tmp_path):
    """An environment with packages for a Python that is nowhere, and engines that print their arguments."""
    root = tmp_path / "quickthaw"
    shutil.copytree(BIN, root / "bin")
    (root / "lib" / "python3.99").mkdir(parents=True)
    (root / ".build").write_text("1")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("vllm", "python3"):
        (programs / name).write_text(f'#!/bin/sh\n[ "$1" = -I ] || echo {name} "$@"\n')
        (programs / name).chmod(0o755)
    return root


def run(*argv, programs=None):
    path = f"{programs}:/usr/bin:/bin" if programs else "/usr/bin:/bin"
    return subprocess.run(
        [str(word) for word in argv],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("launch -- vllm serve m", "vllm serve m"),
        ("launch --idle-timeout 10m --snapshot-name vllm -- vllm serve m", "vllm serve m"),
        ("launch --idle-timeout 10m vllm --model m", "vllm serve --model m"),
        ("launch vllm serve m", "vllm serve m"),
        ("launch --quiet sglang --model-path m", "python3 -m sglang.launch_server --model-path m"),
    ],
)
def test_a_launch_whose_environment_does_not_work_is_the_engines_command(environment, words, command):
    done = run(environment / "bin" / "quickthaw", *words.split(), programs=environment.parent / "programs")
    assert (done.returncode, done.stdout) == (0, command + "\n")
    assert done.stderr.startswith("quickthaw: run-as-given: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", ["", "launch", "launch --help", "doctor"])
def test_what_names_no_engine_fails_with_the_cause(environment, words):
    done = run(environment / "bin" / "quickthaw", *words.split(), programs=environment.parent / "programs")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("quickthaw: image-python: ") and len(done.stderr.splitlines()) == 1


def test_a_copy_that_was_killed_is_made_anew(environment, tmp_path):
    target = tmp_path / "volume"
    (target / ".bin").mkdir(parents=True)
    (target / ".bin" / "half").touch()
    done = run(environment / "bin" / "copy-into", target)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(target / "bin")) == sorted(os.listdir(BIN)) and not (target / ".bin").exists()
