"""Everything that a command line names for an engine to read counts by content, in every form of value."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.compatibility import hub
from checkpoint.compatibility.file_digests import FILES_LIMIT, FileDigests
from checkpoint.compatibility.inputs import Inputs, option
from checkpoint.compatibility.launch_options import normalised_arguments

pytestmark = pytest.mark.t0

BIG = 2 << 20


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a file, and a folder that holds a file of 2 MiB."""
    folder = tmp_path / "work"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"a" * BIG)
    (folder / "table.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


def edit(path: Path) -> None:
    """Change one byte, with size, mtime and inode unchanged."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"#")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def counts(line: list[str], change: Callable[[], object], kept: Path, **more: object) -> bool:
    """Return whether a change on the disk changes the identity of a command line. Asserts that no change keeps it."""

    def now() -> object:
        inputs = Inputs(line, cache=kept, **more)  # type: ignore[arg-type]
        found = normalised_arguments("vllm", line, (), inputs)
        inputs.digests.save()
        return found

    before = now()
    assert now() == before
    change()
    return now() != before


FOLDER = [
    ["--tokenizer", "{}"],
    ["--tokenizer={}"],
    ["--lora-modules", "sql={}", "other=x"],
    ["--lora-paths", "a=/nowhere,b={}"],
    ["--lora-modules", '{{"name": "sql", "path": "{}"}}'],
    ["--lora-paths", '[{{"lora_name": "sql", "lora_path": "{}"}}]'],
    ["--speculative-config", '{{"method": "draft_model", "model": "{}", "num_speculative_tokens": 3}}'],
    ["--speculative-config.model", "{}"],
    ["--speculative-draft-model-path", "{}"],
    ["--default-mm-loras", '{{"image": "{}"}}'],
    ["--generation-config", "{}"],
    ["--hf-config-path", "{}"],
]


@pytest.mark.parametrize("words", FOLDER, ids=lambda words: " ".join(words))
@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_of_any_size_counts_by_content(work: Path, tmp_path: Path, words: list[str], relative: bool) -> None:
    name = "adapter" if relative else str(work / "adapter")
    line = ["--model", "/m", *(word.format(name) for word in words)]
    changed = work / "adapter" / "adapter_model.safetensors"
    assert counts(line, lambda: edit(changed), tmp_path / "kept")
    assert counts(line, lambda: (work / "adapter" / "chat_template.jinja").write_text("x"), tmp_path / "kept")
    assert counts(line, lambda: changed.rename(work / "adapter" / "renamed"), tmp_path / "kept")


FILE = [
    ["--chat-template", "{}"],
    ["--tool-parser-plugin", "{}"],
    ["--reasoning-parser-plugin={}"],
    ["--quantization-param-path", "{}"],
    ["--hicache-storage-backend-extra-config", "@{}"],
    ["--speculative-token-map", "x={}"],
    ["--quantization-config", '{{"scales": ["{}"]}}'],
    ["--unknown-flag", "{}"],
]


@pytest.mark.parametrize("words", FILE, ids=lambda words: " ".join(words))
@pytest.mark.parametrize("size", [10, BIG])
def test_a_file_of_any_size_counts_by_content(work: Path, tmp_path: Path, words: list[str], size: int) -> None:
    (work / "table.json").write_bytes(b"x" * size)
    line = ["--model", "/m", *(word.format(work / "table.json") for word in words)]
    assert counts(line, lambda: edit(work / "table.json"), tmp_path / "kept")


@pytest.mark.parametrize(
    "words",
    [
        ["--served-model-name", "adapter"],
        ["--allowed-local-media-path", "{}"],
        ["--download-dir", "{}"],
        ["--compilation-config", '{{"cache_dir": "{}"}}'],
        ["--profiler-config.torch_profiler_dir", "{}"],
        ["--export-metrics-to-file-dir={}"],
        ["--root-path", "{}"],
    ],
    ids=lambda words: words[0],
)
def test_names_and_the_engines_output_files_do_not_count(work: Path, tmp_path: Path, words: list[str]) -> None:
    line = ["--model", "/m", *(word.format(work / "adapter") for word in words)]
    assert not counts(line, lambda: (work / "adapter" / "more").write_text("x"), tmp_path / "kept")


def test_the_models_own_folder_counts_by_its_manifest_alone(work: Path, tmp_path: Path) -> None:
    (work / "link").symlink_to(work / "adapter")
    for name in (str(work / "adapter"), "adapter", str(work / "link")):
        line = ["--model", name, "--tokenizer", name]
        more = {"model": work / "adapter", "model_name": name}
        assert not counts(line, lambda: edit(work / "adapter" / "adapter_model.safetensors"), tmp_path / "kept", **more)


def test_files_named_by_a_configuration_file_count(work: Path, tmp_path: Path) -> None:
    config = work / "config.yaml"
    config.write_text(
        f"# ours\nchat-template: {work}/table.json\nlora-modules:\n  - sql={work}/adapter\nserved-model-name: adapter\n"
        f'speculative-config: {{"model": "{work}/draft"}}\ndownload_dir: {tmp_path}\n'
    )
    (work / "draft").mkdir()
    (work / "draft" / "config.json").write_text("{}")
    line = ["--model", "/m", "--config", str(config)]
    for changed in (
        work / "table.json",
        work / "adapter" / "adapter_model.safetensors",
        work / "draft" / "config.json",
        config,
    ):
        assert counts(line, lambda changed=changed: edit(changed), tmp_path / "kept"), changed  # type: ignore[misc]


def modules(folder: Path) -> Path:
    (folder / "mine").mkdir(parents=True)
    for name in ("__init__", "auth", "helper"):
        (folder / "mine" / f"{name}.py").write_text("x = 1\n")
    (folder / "single.py").write_text("x = 1\n")
    return folder


@pytest.mark.parametrize("where", ["working folder", "PYTHONPATH", ".pth"])
@pytest.mark.parametrize(
    "words",
    [
        ["--middleware", "mine.auth.Keys"],
        ["--middleware", "single.Keys"],
        ["--logits-processors", "mine.auth:Keys"],
        ["--worker-extension-cls", "mine.auth.Keys"],
        ["--kv-transfer-config", '{"kv_connector_module_path": "mine.auth"}'],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_module_counts_by_its_sources(work: Path, tmp_path: Path, words: list[str], where: str) -> None:
    folder = modules(work if where == "working folder" else tmp_path / "lib")
    site = tmp_path / "site"
    site.mkdir()
    environment = {"PYTHONPATH": f"/nowhere:{folder}"} if where == "PYTHONPATH" else {}
    if where == ".pth":
        (site / "editable.pth").write_text(f"import os\n{folder}\n")
    more = {"environment": environment, "modules": [site]}
    changed = folder / "single.py" if "single" in words[1] else folder / "mine" / "helper.py"
    assert counts(["--model", "/m", *words], lambda: edit(changed), tmp_path / "kept", **more)


def test_an_installed_module_counts_by_its_own_file_and_the_engine_by_its_build(work: Path, tmp_path: Path) -> None:
    site = modules(tmp_path / "site")
    line, more = ["--middleware", "mine.auth.Keys"], {"modules": [site], "engine": "vllm"}
    assert counts(line, lambda: edit(site / "mine" / "auth.py"), tmp_path / "kept", **more)
    assert not counts(line, lambda: edit(site / "mine" / "helper.py"), tmp_path / "kept", **more)
    (site / "vllm").mkdir()
    (site / "vllm" / "own.py").write_text("x = 1\n")
    line = ["--middleware", "vllm.own.Keys"]
    assert not counts(line, lambda: edit(site / "vllm" / "own.py"), tmp_path / "kept", **more)


def test_modules_on_the_python_path_count_by_their_code(work: Path, tmp_path: Path) -> None:
    folder = modules(tmp_path / "lib")
    package = folder / "installed"
    for at in (folder / "namespace" / "deep", package, folder / "installed-1.dist-info", tmp_path / "site" / "beside"):
        at.mkdir(parents=True)
    (folder / "mine" / "notes.txt").write_text("words")
    (folder / "mine" / "fast.so").write_bytes(b"code")
    (folder / "LICENSE").write_text("words")
    (folder / "namespace" / "deep" / "part.py").write_text("x = 1\n")
    (package / "__init__.py").write_text("x = 1\n")
    (folder / "installed-1.dist-info" / "RECORD").write_text("installed/__init__.py,sha256=abc,6\n")
    beside = tmp_path / "site" / "beside" / "__init__.py"
    beside.write_text("x = 1\n")

    def read(value: str) -> str:
        return Inputs([], modules=[tmp_path / "site"]).variable("PYTHONPATH", value)

    value = f":/nowhere:{folder}:{tmp_path / 'site'}"
    for name, seen in (
        ("mine/helper.py", True),
        ("mine/fast.so", True),
        ("namespace/deep/part.py", True),
        ("single.py", True),
        ("installed-1.dist-info/RECORD", True),
        ("installed/__init__.py", False),
        ("mine/notes.txt", False),
        ("LICENSE", False),
    ):
        before = read(value)
        edit(folder / name)
        assert (read(value) != before) is seen, name
    before = read(value)
    edit(beside)
    for name in ("__pycache__", "logs"):  # the engine makes it
        (folder / name).mkdir()
        (folder / name / "x.pyc").write_text("x")
    assert read(value) == before
    os.chdir(tmp_path)
    assert read("lib") == read(str(folder))


def repository(cache: Path, name: str, **refs: str) -> Path:
    repo = cache / f"models--{name.replace('/', '--')}"
    for ref, commit in refs.items():
        (repo / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (repo / "snapshots" / commit / "config.json").write_text(commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return repo


@pytest.mark.parametrize(
    ("words", "moves"),
    [
        (["--tokenizer", "acme/tok"], "main"),
        (["--tokenizer", "acme/tok", "--tokenizer-revision", "dev"], "dev"),
        (["--tokenizer", "acme/tok", "--revision=dev"], "dev"),
        (["--speculative-config", '{"model": "acme/tok", "revision": "dev"}'], "dev"),
        (["--speculative-config", '{"model": "acme/tok"}'], "main"),
        (["--speculative-draft-model-path", "acme/tok", "--speculative-draft-model-revision", "dev"], "dev"),
        (["--lora-modules", "sql=acme/tok"], "main"),
        (["--code-revision", "dev"], "dev"),
    ],
    ids=str,
)
def test_a_hub_repository_counts_at_its_revision(work: Path, tmp_path: Path, words: list[str], moves: str) -> None:
    cache = tmp_path / "hub"
    repo = repository(cache, "acme/tok", main="aaaa", dev="bbbb")
    (repo / "snapshots" / "cccc").mkdir()
    more = {"environment": {"HF_HUB_CACHE": str(cache)}, "model_name": "acme/tok"}
    line = ["--model", "acme/tok", *words]
    other = repo / "refs" / ("dev" if moves == "main" else "main")
    assert not counts(line, lambda: other.write_text("cccc"), tmp_path / "kept", **more)
    assert counts(line, lambda: (repo / "refs" / moves).write_text("cccc"), tmp_path / "kept", **more)


def test_a_trusted_models_code_from_other_repositories_counts(work: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    repo = repository(cache, "acme/code", main="aaaa", v2="bbbb")
    (work / "adapter" / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "acme/code--modeling.Model"}}))

    def code(*words: str) -> str:
        environment = {"HF_HUB_CACHE": str(cache)}
        return Inputs(["--model", "m", *words], environment, model=work / "adapter", model_name="m").remote_code()

    (work / "config.yaml").write_text("trust-remote-code: true\n")
    assert code() == ""
    assert code("--config", "config.yaml") == code("--trust-remote-code=true") == code("--trust-remote-code")
    before, pinned = code("--trust-remote-code"), code("--trust_remote_code", "--code-revision", "v2")
    assert before and pinned and before != pinned
    (repo / "snapshots" / "aaaa" / "config.json").write_text("edited")
    assert code("--trust-remote-code") != before
    assert code("--trust_remote_code", "--code-revision", "v2") == pinned


def test_hub_cache_folders_follow_the_environment(tmp_path: Path) -> None:
    home = str(tmp_path)
    assert hub.caches({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == [Path("/a")]
    assert hub.caches({"HF_HOME": "/b", "TRANSFORMERS_CACHE": "/t"}, "/d") == [Path("/d"), Path("/b/hub"), Path("/t")]
    assert hub.caches({"XDG_CACHE_HOME": home}) == [tmp_path / "huggingface" / "hub"]
    repository(tmp_path, "acme/tiny", main="aaaa")
    (tmp_path / "models--acme--tiny" / "refs" / "pr").mkdir()
    (tmp_path / "models--acme--tiny" / "refs" / "pr" / "1").write_text("aaaa")
    folder = tmp_path / "models--acme--tiny" / "snapshots" / "aaaa"
    for revision in (None, "main", "pr/1", "aaaa"):
        assert hub.folder("acme/tiny", revision, [tmp_path]) == folder
    for name, revision in (
        ("acme/tiny", "dev"),
        ("acme/none", None),
        ("../x", None),
        ("acme/tiny", "../main"),
        ("a\0", None),
    ):
        assert hub.folder(name, revision, [tmp_path]) is None


def test_the_last_value_counts_and_the_command_line_precedes_a_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tokenizer: x\nrevision: 'filed' # ours\n")
    assert option(["--revision", "a", "--revision=b"], "revision") == "b"
    assert option(["--config", str(config)], "revision") == "filed"
    assert option(["--config", str(config), "--revision", "given"], "revision") == "given"
    assert option(["--config", str(config)], "code-revision") is None
    assert option(["--revision"], "revision") is None


def test_an_unchanged_large_file_is_read_once(work: Path, tmp_path: Path) -> None:
    file, kept = work / "adapter" / "adapter_model.safetensors", tmp_path / "state" / "kept"
    os.utime(file)
    time.sleep(0.11)  # a file written just now is read again
    first = FileDigests(kept)
    digest = first.of_file(file)
    first.save()
    assert kept.stat().st_mode & 0o777 == 0o600
    text = kept.read_text()
    kept.write_text(text.replace(digest, "0" * 32))
    assert FileDigests(kept).of_file(file) == "0" * 32  # it was not read
    edit(file)
    assert FileDigests(kept).of_file(file) not in (digest, "0" * 32)
    kept.write_text("{garbled")
    assert FileDigests(kept).of_file(file) not in (digest, "0" * 32)
    unwritable = FileDigests(Path("/proc/none/kept"))
    unwritable.of_file(file)
    unwritable.save()


def test_folders_with_special_files_are_digested(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "dead").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"1")
    (folder / os.fsdecode(b"\xff")).write_text("x")
    digest = FileDigests().of_folder(folder)
    (folder / "__pycache__" / "x.pyc").write_bytes(b"2")
    assert FileDigests().of_folder(folder) == digest
    (folder / "dead").unlink()
    assert FileDigests().of_folder(folder) != digest


def test_a_folder_with_too_many_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("checkpoint.compatibility.file_digests.FILES_LIMIT", 5)
    for number in range(7):
        (tmp_path / str(number)).write_text("x")
    assert FileDigests().of_folder(tmp_path) is None
    line = ["--tokenizer", str(tmp_path)]
    normalised_arguments("vllm", line, (), Inputs(line))
    assert f"more than {FILES_LIMIT} files" in caplog.text


@pytest.mark.parametrize(
    "value", ["x" * 5000, "a\0b", "~nobody-here/x", '{"a": ' * 2000, "[" * 5000, "/", ".", "", "-1", "é" * 3000]
)
def test_a_value_that_names_no_file_is_a_plain_value(work: Path, value: str) -> None:
    assert Inputs([]).value("--x", value) == value
