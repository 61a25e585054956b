"""The words after `launch`: an engine with its arguments, or the command that a container runs."""

import os
import sys
from pathlib import Path

import pytest

from launchers import ENGINES
from launchers.base import EngineCommand
from launchers.command_words import Words, read, script_python, unexpanded
from launchers.errors import Usage
from launchers.model_source import why_plain

pytestmark = pytest.mark.t0
PYTHON = os.path.abspath(sys.executable)


@pytest.fixture
def path(tmp_path):
    """Return a folder of programs: shells, env, and links to this interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "bash", "env", "tool"):
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    (folder / "python3").symlink_to(os.path.realpath(sys.executable))
    return str(folder)


@pytest.mark.parametrize(
    ("words", "engine", "arguments"),
    [
        ("vllm serve M --port 1", "vllm", "M --port 1"),
        ("vllm --model M", "vllm", "--model M"),
        ("vllm M --port 1", "vllm", "M --port 1"),
        ("vllm", "vllm", ""),
        ("sglang serve M --tp 2", "sglang", "M --tp 2"),
        ("sglang serve --model-type llm M", "sglang", "M"),
        ("sglang serve --model-type=auto M", "sglang", "M"),
        ("python3 -m vllm.entrypoints.openai.api_server --model M", "vllm", "--model M"),
        ("python3 -u -m sglang.launch_server --model-path M", "sglang", "--model-path M"),
        ("python3 -m sglang.cli.main serve M", "sglang", "M"),
        ("python3 -m vllm.entrypoints.cli.main serve M", "vllm", "M"),
        ("env vllm serve M", "vllm", "M"),
    ],
)
def test_a_command_is_read_as_an_engine_with_arguments(words, engine, arguments, path):
    found = read(words.split(), path)
    assert (found.engine, found.arguments, found.plain) == (engine, tuple(arguments.split()), "")
    assert found.python == (f"{path}/python3" if words.startswith("python3") else "")


@pytest.mark.parametrize(
    ("script", "variables", "arguments"),
    [
        ("vllm serve M", {}, ["M"]),
        ("  exec vllm serve M --port 1\n", {}, ["M", "--port", "1"]),
        ("exec vllm serve M \\\n  --port 1 \\\n  --seed 2", {}, ["M", "--port", "1", "--seed", "2"]),
        ("A=1 B='x y' exec vllm serve M", {"A": "1", "B": "x y"}, ["M"]),
        ("exec env A=1 vllm serve M", {"A": "1"}, ["M"]),
        (
            """vllm serve "M" --rope '{"a": [1, "b$c"]}' --x "a \\" b" --y=a\\ b ''""",
            {},
            ["M", "--rope", '{"a": [1, "b$c"]}', "--x", 'a " b', "--y=a b", ""],
        ),
        ("exec sh -c 'vllm serve M'", {}, ["M"]),
    ],
)
@pytest.mark.parametrize("shell", ["sh -c", "bash -ec", "env C=3 sh -c"])
def test_a_simple_shell_command_is_read(script, variables, arguments, shell, path):
    found = read([*shell.split(), script], path)
    assert (found.engine, list(found.arguments), found.plain) == ("vllm", arguments, "")
    assert found.variables == variables | ({"C": "3"} if "C=3" in shell else {})


@pytest.mark.parametrize(
    "script",
    [
        "vllm serve $MODEL",
        'vllm serve "$MODEL"',
        "vllm serve `cat model`",
        "vllm serve M | tee log",
        "vllm serve M > log",
        "vllm serve M &",
        "cd /x && vllm serve M",
        "cd /x; vllm serve M",
        "sleep 1\nvllm serve M",
        "vllm serve ~/M",
        "vllm serve /models/*",
        "vllm serve M # here",
        "vllm serve 'M",
        "ulimit -n 1",
        "exec -a x vllm serve M",
        "vllm --model M",
        "tool x",
        "A=1",
        "",
    ],
)
def test_complex_shell_commands_run_as_given(script, path):
    words = ["sh", "-c", script]
    found = read(words, path)
    assert found.plain and found == Words(plain=found.plain, given=tuple(words))
    assert "\n" not in found.plain


@pytest.mark.parametrize(
    "words",
    [
        "vllm bench serve",
        "sglang generate --prompt x",
        "sglang serve M --model-type diffusion",
        "python3 serve.py",
        "python3 -X dev -m sglang.launch_server --model-path M",
        "python3",
        "env -i vllm serve M",
        "env",
        "sh run.sh",
        "tool --x",
    ],
)
def test_commands_that_start_no_engine_server_run_as_given(words, path):
    found = read(words.split(), path)
    assert found.plain and found.given == tuple(words.split())


def test_a_diffusion_model_runs_as_given(path, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert read(["sglang", "serve", str(tmp_path)], path).plain
    assert read(["sglang", "serve", f"--model-path={tmp_path}"], path).plain


def test_a_folder_named_like_a_command_is_a_model(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bench").mkdir()
    assert read(["vllm", "bench"], path).arguments == ("bench",)


@pytest.mark.parametrize("words", ["llama.cpp --model M", "/nowhere/python -m vllm.entrypoints.openai.api_server"])
def test_an_unknown_first_word_is_refused(words, path):
    with pytest.raises(Usage) as refused:
        read(words.split(), path)
    assert refused.value.code == "unknown-engine"


@pytest.mark.parametrize(
    "head",
    [
        f"#!{PYTHON}\nimport x\n",
        f"#!{PYTHON} -E\n",
        f"#!/bin/sh\n'''exec' \"{PYTHON}\" \"$0\" \"$@\"\n' '''\nimport x\n",
        f"#!/bin/sh\n'''exec' {PYTHON} \"$0\" \"$@\"\n' '''\nimport x\n",
    ],
)
def test_a_scripts_interpreter_is_the_engines_interpreter(head, tmp_path, path):
    script = tmp_path / "vllm"
    script.write_text(head)
    assert script_python(script) == PYTHON
    found = read([str(script), "serve", "M"], path)
    assert (found.engine, found.python, found.arguments) == ("vllm", PYTHON, ("M",))
    assert read([PYTHON, str(script), "serve", "M"], path).engine == "vllm"
    assert read([str(script), "collect-env"], path).plain


def test_a_script_without_an_interpreter_line_uses_the_one_beside_it(tmp_path):
    script = tmp_path / "vllm"
    with pytest.raises(Usage) as missing:
        script_python(script)
    script.write_bytes(b"\x7fELF")
    with pytest.raises(Usage) as none:
        script_python(script)
    assert missing.value.code == none.value.code == "engine-script"
    (tmp_path / "python").symlink_to(PYTHON)
    assert script_python(script) == str(tmp_path / "python")


def test_a_version_managers_script_is_asked_for_its_interpreter(tmp_path):
    shim = tmp_path / "python3"
    shim.write_text(f'#!/bin/sh\nexec {PYTHON} "$@"\n')
    shim.chmod(0o755)
    assert read([str(shim), "-m", "sglang.launch_server", "--model-path", "M"]).python == sys.executable


def test_unexpanded_variables_are_reported():
    words = ("--host", "$(POD_IP)", "--seed=${SEED}", "--x", "$5", "(a)")
    assert unexpanded(words) == ("$(POD_IP)", "--seed=${SEED}")


def test_an_engine_without_an_option_table_is_read_too(monkeypatch):
    monkeypatch.setitem(ENGINES, "other", ("launchers.other", "Other"))
    assert read(["other", "--model", "M"]) == Words("other", ("--model", "M"))
    assert read(["other", "serve", "M"]) == Words("other", ("M",))
    assert why_plain(EngineCommand("other", (), "acme/m", "127.0.0.1", 1), {}) is None
