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
        ("launch --sleep-after 10m --snapshot-name vllm -- vllm serve m", "vllm serve m"),
        ("launch --sleep-after 10m vllm --model m", "vllm serve --model m"),
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


@pytest.mark.slow
def test_pull_snapshot_fetches_what_the_arguments_select_and_never_keeps_a_pod_from_starting(
    environment, tmp_path, monkeypatch
):
    """With a double of `quickthaw` itself: which words it gets, and what becomes of its failures."""
    program = environment / "bin" / "pull-snapshot"
    script = '[ "$1 $2" = "snapshot $FAILS" ] && exit 1; [ "$1 $2" = "snapshot $STALLS" ] && exec sleep 60; echo "$@" >>"$0.said"; [ "$2" = pull ] || echo NAME'
    (environment / "bin" / "quickthaw").write_text(f"#!/bin/sh\n{script}\n")
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    said = tmp_path / "quickthaw" / "bin" / "quickthaw.said"

    def pull(fails=""):
        monkeypatch.setenv("FAILS", fails)
        said.unlink(missing_ok=True)
        done = run(program, "vllm", "--model", "a b")
        assert done.returncode == 0 and done.stdout == ""
        return done.stderr, said.read_text().splitlines() if said.exists() else []

    monkeypatch.delenv("QUICKTHAW_SNAPSHOT_STORE", raising=False)
    assert "names no store" in pull()[0]
    monkeypatch.setenv("QUICKTHAW_SNAPSHOT_STORE", "/store")
    assert pull() == ("", ["snapshot key vllm --model a b", "snapshot pull NAME /store"])
    for step in ("key", "pull"):
        assert "the engine starts without waiting for it" in pull(step)[0]
        with monkeypatch.context() as stalls:
            stalls.setenv("STALLS", step)
            stalls.setenv("QUICKTHAW_PULL_TIMEOUT", "0.3s")
            assert "no snapshot within 0.3s" in pull()[0]
    with monkeypatch.context() as wrong:
        wrong.setenv("QUICKTHAW_PULL_TIMEOUT", "soon")
        assert "QUICKTHAW_PULL_TIMEOUT=soon is no duration" in pull()[0]
    (tmp_path / "home" / "snapshots" / "NAME").mkdir(parents=True)
    (tmp_path / "home" / "snapshots" / "NAME" / "manifest.json").touch()
    assert pull() == ("quickthaw: pull-snapshot: NAME is here already\n", ["snapshot key vllm --model a b"])


def test_an_image_of_an_engine_that_is_none_is_refused():
    """Before anything is built."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for arguments, named in ((("BASE=x", "ENGINE=tgi"), "not tgi"), ((), "give the engine")):
        done = subprocess.run(
            ["make", "image", *arguments], cwd=REPO, env=env, capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 2 and named in done.stderr, done.stderr
    check = (REPO / "deploy" / "container" / "Containerfile").read_text().split("RUN ", 1)[1].split("\\\n")[0]
    for engine, code in (("vllm", 0), ("sglang", 0), ("tgi", 2), ("", 2)):
        done = subprocess.run(
            ["sh", "-c", check], env={**env, "ENGINE": engine}, capture_output=True, timeout=20, check=False
        )
        assert done.returncode == code


@pytest.mark.parametrize("wheels_of_extras", [True, False])
def test_an_image_without_wheels_of_the_extras_serves_engines(tmp_path, wheels_of_extras):
    """With a double of Python and pip: what is installed."""
    (tmp_path / "quickthaw-1-py3-none-any.whl").touch()
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(f"""#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$4/bin" ;;
"-m pip") echo "$@" >>{said}; case "$*" in *kubernetes*) exit {int(not wheels_of_extras)} ;; esac ;;
*) case "$2" in *_base_executable*) echo "$0" ;; esac ;;
esac
""")
    python.chmod(0o755)
    words = ["env", f"PYTHON={python}", BIN / "install", tmp_path, tmp_path / "target"]
    done = run(*words)
    installed = [line for line in said.read_text().splitlines() if " install " in line]
    assert [("[kubernetes,keda]" in line) for line in installed] == [True] + [False] * (not wheels_of_extras)
    assert ("no activator" in done.stderr) is not wheels_of_extras
