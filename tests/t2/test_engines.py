"""The main job with the real engines: nothing here is a double. One cold start of each engine, and everything that its snapshot can do.

A skipped test in this folder is a failure in CI (.ci/run counts).
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

import launchers
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import dump
from checkpoint.store.archive import open_chunks
from checkpoint.store.cache_archive import pull_cache
from launchers.base import INNER_PORT
from launchers.engine_site import engine_site
from plugin.bench import client as measure
from plugin.bench.presets import preset
from plugin.proxy.http.path_rules import PathRules, Verdict
from plugin.runtime.config import state_home
from tests.attacks import spellings
from tests.leftovers import Watch

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]
REPO = Path(__file__).parents[2]
ROUTES = REPO / "tests" / "programs" / "engine_routes.py"
NAME = "under-test"
COLD_LIMIT_S = 900.0


class Rig:
    """One engine with a state folder of its own; compile caches and CRIU are the machine's."""

    def __init__(self, engine, home):
        self.engine, self.home = engine, home
        self.preset = preset(engine, state_home())
        # A tokenizer in a folder of its own, which a test edits.
        self.tokenizer = home / "tokenizer"
        shutil.copytree(self.preset.model, self.tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
        flag = "--tokenizer" if engine == "vllm" else "--tokenizer-path"
        self.arguments = (*self.preset.arguments, flag, str(self.tokenizer))
        self.library = Library(home)
        self.cold_text = ""
        self.cold_status = {}
        self.watch = Watch(home)

    def command(self, *options, words=("launch",), arguments=None, **environment):
        port = measure.free_port()
        env = {
            **os.environ,
            **self.preset.environment,
            "QUICKTHAW_HOME": str(self.home),
            **self.watch.environment,
            **environment,
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        argv = [sys.executable, "-m", "plugin", *words, *options]
        if words[0] == "launch":
            argv += [
                "--engine-python",
                str(self.preset.python),
                *([] if "--name" in options else ["--name", NAME]),
                # What `auto` would choose depends on how busy the machine is.
                *([] if "--weights" in options else ["--weights", "full"]),
                self.engine,
            ]
            argv += [*(self.arguments if arguments is None else arguments), "--host", "127.0.0.1"]
        argv += ["--port", str(port)]
        return port, measure.Command(argv, env, self.home / f"{'-'.join(words)}-{port}.log", REPO)

    @contextlib.contextmanager
    def running(self, *options, limit_s=COLD_LIMIT_S, **more):
        """A command with its first answer; stopped with SIGTERM at the end, and everything of it gone."""
        port, command = self.command(*options, **more)
        process = command.start()
        try:
            answer = measure.waiting_client(port, str(self.preset.model), command.began, limit_s, process)
            yield port, answer, process, command
        finally:
            code = command.stop()
            text = command.log.read_text(errors="replace")
            assert "Traceback" not in _ours(text), _ours(text)[-3000:]
        assert code in (0, 143), text[-2000:]
        assert self.watch.gone() == set()


def _ours(text):
    """The log's lines that are quickthaw's own, with what follows a traceback of ours."""
    return "\n".join(
        line
        for line in text.splitlines()
        if line.startswith(("quickthaw:", "Traceback")) and "site-packages" not in line
    )


def post(port, path, body, timeout_s=60.0):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


def phases(port):
    return [[span["phase"] for span in r["timeline"]] for r in measure.status(port)["pools"][0]["replicas"]]


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def rig(request, tmp_path_factory):
    """Cold start of a real engine through the lazy mount, with a snapshot at its end."""
    home = tmp_path_factory.mktemp(request.param)
    shared = state_home()
    (shared / "compile").mkdir(mode=0o700, exist_ok=True)
    (home / "compile").symlink_to(shared / "compile")
    (home / "criu").symlink_to(shared / "criu")
    rig = Rig(request.param, home)
    with rig.running("--snapshot-store", str(home / "kept")) as (port, answer, _, command):
        rig.cold_text = answer.text
        rig.cold_status = measure.status(port)
        rig.mounts = [
            line for line in Path("/proc/self/mounts").read_text().splitlines() if str(home) in line and "fuse" in line
        ]
        if request.param == "vllm":
            limit = time.monotonic() + 120
            while "kept in" not in command.log.read_text() and time.monotonic() < limit:
                time.sleep(0.2)
    yield rig
    shutil.rmtree(home, ignore_errors=True)


def test_the_cold_start_answers_serves_on_and_leaves_a_snapshot(rig):
    assert "degrees" in rig.cold_text
    timeline = [span["phase"] for span in rig.cold_status["pools"][0]["replicas"][0]["timeline"]]
    assert timeline == ["mounting", "starting", "loading", "warming", "shrinking", "checkpointing", "resuming"]
    assert len(rig.mounts) == 1
    snapshot = rig.library.load(NAME)
    assert snapshot.kv_cache_bytes > 300e6
    assert snapshot.canary.token_ids


def routes(rig, arguments, environment):
    """What the engine's own application answers to, built in its interpreter: [method, path] of each route."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as out:
        env = {**os.environ, **rig.preset.environment, **environment, "ROUTES_FD": str(writer)}
        argv = [str(rig.preset.python), str(ROUTES), rig.engine, *arguments]
        done = subprocess.run(argv, env=env, pass_fds=[writer], capture_output=True, text=True, timeout=300)
        os.close(writer)
        assert done.returncode == 0, done.stderr[-2000:]
        return {tuple(route) for route in json.load(out)}


def attack(port, requests, pid=None):
    """Statuses of requests (method, target) on a port; with `pid`, in the network of that process."""
    argv = ["nsenter", "-t", str(pid), "-n"] if pid else []
    argv += [sys.executable, str(REPO / "tests" / "attacks.py"), str(port)]
    done = subprocess.run(
        argv, input=json.dumps(requests), capture_output=True, text=True, timeout=300, check=True, cwd=REPO
    )
    return dict(zip(requests, json.loads(done.stdout), strict=True))


def test_nothing_is_open_that_the_engine_alone_would_not_open(rig):
    """The engine's route table with us and without, and every route that developer mode would add posted to: through the public port,
    and at the engine's own port."""
    engine = launchers.engine(rig.engine)
    site = engine_site(rig.home, REPO / "plugin" / "engine")
    command = engine.parse(rig.preset.arguments, {})
    ours = engine.environment(
        {**os.environ, **rig.preset.environment}, command, sandboxed=True, site=str(site), cache=str(rig.home)
    )
    alone = routes(rig, rig.preset.arguments, {})
    assert routes(rig, [*command.arguments, *engine.control_arguments()], ours) == alone
    developer = (
        routes(rig, rig.preset.arguments, {"VLLM_SERVER_DEV_MODE": "1"}) - alone if rig.engine == "vllm" else set()
    )
    assert (len(developer) > 20) == (rig.engine == "vllm")
    with rig.running(limit_s=120.0) as (port, _, process, _):
        root = engine_root(process)
        schema = json.loads(get(port, "/openapi.json"))["paths"]
        live = {(method.upper(), path) for path, methods in schema.items() for method in methods}
        assert live <= {(method, re.sub(r":\w+}", "}", path)) for method, path in alone} and len(live) > 20
        closed = [(method, prefix + path) for method, path in sorted(developer) for prefix in ("", "/api")]
        closed += [("POST", path) for path in spellings("/quickthaw-control")]
        if rig.engine == "vllm":
            closed += [("POST", path) for path in spellings("/collective_rpc")]
            assert set(attack(INNER_PORT, closed, root).values()) <= {400, 404}
        closed += [("POST", target) for path in sorted(engine.denied_paths) for target in spellings(path)]
        answers = attack(port, closed)
        assert set(answers.values()) <= {400, 404}, {
            asked: got for asked, got in answers.items() if got not in (400, 404)
        }
        # … and it serves as before.
        again = measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 60.0)
        assert again.text == rig.cold_text


LEFT_OPEN = {
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/abort_request",
    "/get_weights_by_name",
    "/is_scaling_elastic_ep",
    "/list_external_corpora",
    "/get_remote_instance_transfer_engine_info",
    "/remote_instance_transfer_engine_info",
}
"""As without us, and said in docs/security.md; nothing of it changes the engine but its adapters."""


def test_what_sglang_keeps_for_its_operators_is_denied_but_for_what_the_docs_name(rig):
    if rig.engine != "sglang":
        return  # vLLM has no such mark; a skip here would count as an engine test that did not run
    engine = launchers.engine(rig.engine)
    kept = routes(rig, rig.preset.arguments, {"OPERATORS_ONLY": "1", "DUMPER_SERVER_PORT": "reuse"})
    rules = PathRules("/-", engine.denied_paths)
    assert len(kept) > 40
    assert {path for _, path in kept if rules.judge(path.encode()) is not Verdict.DENIED} == LEFT_OPEN


def test_ten_restores_in_a_row_all_verify_and_answer_the_same(rig):
    for _ in range(10):
        with rig.running(limit_s=120.0) as (port, answer, _, _):
            assert answer.text == rig.cold_text
            assert phases(port) == [["mounting", "restoring", "waking", "verifying"]]


def test_two_replicas_of_one_snapshot_answer_at_the_same_time(rig):
    with rig.running("--replicas", "2", NAME, words=("restore",), limit_s=120.0) as (port, answer, _, _):
        assert answer.text == rig.cold_text
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            replicas = measure.status(port)["pools"][0]["replicas"]
            if all(replica["phase"] == "serving" for replica in replicas):
                break
            time.sleep(0.1)
        body = {"model": str(rig.preset.model), "prompt": measure.PROMPT, "max_tokens": 16, "temperature": 0}
        # One at a time for each replica: in a batch the engine alone gives another greedy text on some processors (bf16 matrix units).
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: post(port, "/v1/completions", body), range(6)))
        assert {status for status, _ in answers} == {200}
        assert {json.loads(data)["choices"][0]["text"] for _, data in answers} == {rig.cold_text}
        served = [replica["served"] for replica in measure.status(port)["pools"][0]["replicas"]]
        assert min(served) > 0, served


def test_plain_restores_work_too(rig):
    with rig.running("--no-lazy", limit_s=120.0) as (port, answer, _, _):
        assert answer.text == rig.cold_text
        assert phases(port) == [["mounting", "restoring", "waking", "verifying"]]


def test_replicas_that_sample_differ_after_a_restore(rig):
    body = {"model": str(rig.preset.model), "prompt": "Once upon a time", "max_tokens": 24, "temperature": 1.0}
    texts, idents = [], []
    for _ in range(2):
        with rig.running(limit_s=120.0) as (port, _, _, _):
            status, data = post(port, "/v1/completions", body)
            assert status == 200
            texts.append(json.loads(data)["choices"][0]["text"])
            idents.append(json.loads(data)["id"])
    assert texts[0] != texts[1]
    assert idents[0] != idents[1]


@pytest.mark.parametrize("fixed", [False, True])
def test_the_engines_own_torch_and_numpy_are_reseeded(rig, fixed):
    """What every process does when it is woken, with the libraries of this engine."""
    script = (
        "import random, sys; sys.path.insert(0, sys.argv[1]); import numpy, torch\n"
        "from plugin.engine import control\n"
        "draw = lambda: (random.random(), float(numpy.random.rand()), float(torch.rand(1)))\n"
        "seed = lambda: (random.seed(1), numpy.random.seed(1), torch.manual_seed(1))\n"
        "seed(); first = draw(); seed(); control.reseed(); second = draw()\n"
        "print([a == b for a, b in zip(first, second)])\n"
    )
    env = {**os.environ, **rig.preset.environment, "QUICKTHAW_FIXED_SEED": "1" if fixed else "0"}
    out = subprocess.run(
        [str(rig.preset.python), "-c", script, str(REPO)], env=env, capture_output=True, text=True, timeout=120
    )
    assert out.stdout.strip() == str([fixed] * 3), out.stderr[-2000:]


def test_the_compiled_code_was_kept_and_comes_back_elsewhere(rig, tmp_path):
    """What the cold start left in the snapshot store, beside the snapshot."""
    names = [p.name for p in (rig.home / "kept").rglob(f"compile-{rig.engine}-*")]
    if rig.engine == "sglang" and not names:
        return  # on a CPU with the native attention SGLang compiles nothing
    assert len(set(names)) == 1, names
    folder = tmp_path / "compile"
    assert pull_cache(names[0], open_chunks(str(rig.home / "kept")), folder) > 0
    have = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    original = state_home() / "compile" / rig.engine
    for name, info in have.items():
        there = (original / name).stat()
        assert (info.st_size, info.st_mtime_ns) == (there.st_size, there.st_mtime_ns), name
    if rig.engine == "vllm":
        assert any("torch_aot_compile" in name for name in have), sorted(have)[:20]


def test_a_pulled_cache_under_another_home_spares_the_compilation(rig, tmp_path):
    """A host that has never compiled: vLLM loads its own AOT artefact instead of tracing and compiling the model."""
    if rig.engine == "sglang":
        return  # on a CPU with the native attention SGLang compiles nothing
    other = Rig(rig.engine, tmp_path / "another home")
    other.arguments = rig.arguments  # the same launch, its tokenizer too
    (other.home / "criu").symlink_to(state_home() / "criu")
    store = ("--snapshot-store", str(rig.home / "kept"), "--no-restore", "--no-snapshot")
    with other.running(*store) as (_, answer, _, command):
        text = command.log.read_text(errors="replace")
        assert answer.text == rig.cold_text
    assert "files from" in text and "Directly load AOT compilation" in text
    assert "Compiling model again" not in text and "saved AOT compiled function" not in text


def packs(engine):
    """Whether the engine keeps its linear layers packed for the processor's bfloat16 instructions instead of as parameters."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return engine == "vllm" and bool(flags & {"amx_tile", "avx512_bf16"})


def weights_in(rig, snapshot):
    """Bytes of weights in a snapshot's images."""
    from checkpoint.inspect.contents import inspect

    found = inspect(rig.library.path(snapshot.name), weights=snapshot.weight_areas)
    return sum(process.kinds["weights"].bytes for process in found.processes if "weights" in process.kinds)


def test_weights_are_told_apart_in_the_images(rig):
    weights = weights_in(rig, rig.library.load(NAME))
    # SmolLM2 in bf16 has 269 MB; the output layer, which is tied, has 57 MB of them and may be packed once more.
    assert 260e6 < weights < (400e6 if packs(rig.engine) else 300e6)


def test_a_request_to_a_sleeping_engine_wakes_it(rig):
    with rig.running("--idle-timeout", "1", limit_s=120.0) as (port, answer, _, _):
        limit = time.monotonic() + 60
        while measure.status(port)["pools"][0]["replicas"][0]["phase"] != "asleep":
            assert time.monotonic() < limit
            time.sleep(0.1)
        again = measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 120.0)
        assert again.text == answer.text == rig.cold_text


def test_an_engine_that_dies_while_serving_comes_back(rig):
    with rig.running(limit_s=120.0) as (port, _, process, _):
        os.kill(engine_root(process), 9)
        limit = time.monotonic() + 120
        while True:
            try:
                answer = measure.stream_completion(port, str(rig.preset.model), time.monotonic(), 16, 120.0)
                break
            except (OSError, measure.MeasureError):
                assert time.monotonic() < limit
        assert answer.text == rig.cold_text


def engine_root(process):
    """The engine's first process, by its number on the host."""
    from checkpoint.sandbox.process_tree import processes

    ours = os.readlink("/proc/self/ns/pid")
    inside = [
        pid
        for pid in processes(process.pid)
        if os.path.exists(f"/proc/{pid}/ns/pid") and os.readlink(f"/proc/{pid}/ns/pid") != ours
    ]
    # The engine's root is the first child of process 1.
    return min(pid for pid in inside if _inner(pid) > 1000)


def _inner(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0


def test_a_damaged_snapshot_is_refused_by_name_and_serves_nothing(rig):
    images = rig.library.path(NAME) / "images"
    largest = max(images.glob("pages-*.img"), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 255]))
    try:
        port, command = rig.command(NAME, words=("restore",))
        process = command.start()
        assert process.wait(120) == 1
        text = command.log.read_text()
        assert "file-digest-differs" in text and largest.name in text
    finally:
        with open(largest, "r+b") as file:
            file.seek(1 << 20)
            file.write(byte)
    rig.library.succeeded(NAME)
    assert rig.watch.gone() == set()


def test_a_wrong_canary_goes_the_cold_way_under_the_same_held_request(rig):
    if rig.engine != "sglang":
        return  # the same code for both engines, and a cold start of a minute
    manifest = rig.library.path(NAME) / "manifest.json"
    good = manifest.read_bytes()
    # A manifest that is whole and says something else: only the engine itself can tell.
    found = rig.library.load(NAME)
    wrong = [*found.canary.token_ids[:-1], found.canary.token_ids[-1] + 1]
    manifest.write_bytes(
        dump(msgspec.structs.replace(found, canary=msgspec.structs.replace(found.canary, token_ids=wrong)))
    )
    try:
        with rig.running("--no-snapshot") as (port, answer, _, command):
            assert answer.text == rig.cold_text
            assert phases(port)[0] == [
                "mounting",
                "restoring",
                "waking",
                "verifying",
                "failed",
                "mounting",
                "starting",
                "loading",
                "warming",
            ]
            assert "canary-differs" in command.log.read_text()
    finally:
        manifest.write_bytes(good)
        rig.library.succeeded(NAME)


def test_without_fuse_and_criu_the_engine_still_serves(rig):
    if rig.engine != "sglang":
        return  # the same code for both engines, and a cold start of a minute
    with rig.running("--no-mount", QUICKTHAW_CRIU="/nowhere/criu") as (port, answer, _, command):
        assert answer.text == rig.cold_text
        assert phases(port) == [["mounting", "starting", "loading", "warming"]]
        assert command.log.read_text().count("snapshots off: criu-missing") == 1


def test_the_image_without_the_kv_cache_is_smaller_by_at_least_its_size(rig):
    if rig.engine != "sglang":
        return  # the same measurement for both engines is in benchmarks/, and a cold start takes a minute
    small = rig.library.load(NAME)
    with rig.running("--no-restore", "--no-shrink", "--name", "naive") as (_, answer, _, _):
        assert answer.text == rig.cold_text
    naive = rig.library.load("naive")
    rig.library.remove("naive")
    assert naive.kv_cache_bytes == 0
    assert naive.image_bytes - small.image_bytes >= small.kv_cache_bytes * 0.99


def test_a_thin_snapshot_carries_no_weights_and_answers_the_same(rig):
    """The weights are read again through the lazy mount, by the engine's own reload."""
    with rig.running("--weights", "thin", "--name", "thin") as (_, answer, _, _):
        assert answer.text == rig.cold_text
    full, thin = rig.library.load(NAME), rig.library.load("thin")
    assert thin.weights == "thin"
    # Weights smaller than a megabyte, those that share a page with something else, and those that are packed stay. What else
    # is in an image differs by tens of megabytes from one start to the next.
    assert weights_in(rig, full) - weights_in(rig, thin) > (30e6 if packs(rig.engine) else 150e6)
    for _ in range(2):
        with rig.running("--weights", "thin", "--name", "thin", limit_s=120.0) as (port, answer, _, _):
            assert answer.text == rig.cold_text
            assert phases(port) == [["mounting", "restoring", "waking", "verifying"]]
    rig.library.remove("thin")


def test_an_engine_that_cannot_load_says_so_in_one_line(rig, tmp_path):
    if rig.engine != "sglang":
        return  # vLLM's own failure takes half a minute longer and shows nothing else
    broken = tmp_path / "model"
    shutil.copytree(rig.preset.model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"], "model_type": "nosuch"}))
    arguments = ["--model-path", str(broken), "--device", "cpu", "--attention-backend", "torch_native"]
    port, command = rig.command(arguments=arguments)
    process = command.start()
    assert process.wait(300) not in (0, None)
    lines = [line for line in command.log.read_text().splitlines() if line.startswith("quickthaw: engine-died")]
    assert len(lines) == 1, command.log.read_text()[-2000:]
    assert rig.watch.gone() == set()


def test_the_snapshot_commands_tell_the_truth(rig):
    env = {**os.environ, "QUICKTHAW_HOME": str(rig.home)}

    def cli(*words):
        return subprocess.run(
            [sys.executable, "-m", "plugin", *words], env=env, cwd=REPO, capture_output=True, text=True, timeout=120
        )

    rows = json.loads(cli("snapshot", "ls", "--json").stdout)
    assert [row["name"] for row in rows] == [NAME]
    found = json.loads(cli("snapshot", "inspect", NAME, "--check", "--contents", "--json").stdout)
    assert found["mismatches"] == []
    assert found["contents"]["total"]["bytes"] == pytest.approx(found["image_bytes"], rel=0.02)
    assert cli("snapshot", "verify", NAME).returncode == 0


def test_an_edited_tokenizer_and_an_unknown_variable_are_refused_by_name(rig):
    template = rig.tokenizer / "chat_template.jinja"
    before = template.read_bytes() if template.exists() else None
    template.write_text("{{ messages[0]['content'] }} edited")
    try:
        port, command = rig.command("--strict", DISABLE_OPENAPI_DOC="1")
        assert command.start().wait(120) == 1
        text = command.log.read_text()
        assert "environment-differs: DISABLE_OPENAPI_DOC" in text
        assert f"arguments-differ: --{'tokenizer' if rig.engine == 'vllm' else 'tokenizer-path'}" in text
    finally:
        template.unlink() if before is None else template.write_bytes(before)
    rig.library.succeeded(NAME)
    assert rig.watch.gone() == set()
    with rig.running("--strict", limit_s=120.0) as (_, answer, _, _):  # by content: what was put back is the same
        assert answer.text == rig.cold_text


def test_every_process_of_a_restored_engine_is_given_this_launchs_variables(rig):
    from checkpoint.sandbox.process_tree import processes
    from checkpoint.sandbox.sandbox import CONTROL_DIR

    with rig.running("--strict", limit_s=120.0, POD_IP="10.9.8.7", HF_TOKEN="hf_renewed") as (_, answer, process, _):
        assert answer.text == rig.cold_text
        inside = [pid for pid in processes(process.pid) if _inner(pid) == 1]
        (folder,) = {Path(f"/proc/{pid}/root{CONTROL_DIR}") for pid in inside}
        said = [note.read_text() for note in folder.glob("*.woken")]
        # SGLang: server, scheduler, detokenizer. vLLM: API server, engine core, worker.
        assert len(said) >= 2 and all(int(text.removeprefix("renewed ")) >= 2 for text in said), said
        assert (folder / "environment").stat().st_mode & 0o777 == 0o600


def test_no_variable_that_the_engine_declares_is_given_anew(rig):
    """The engine's own list, from its own interpreter, against ours: what is on neither of our lists matters."""
    from checkpoint.compatibility.engine import declared_variables, package_folders
    from checkpoint.compatibility.environment import KEPT, by_kind

    code = {
        "vllm": "import vllm.envs; print(*vllm.envs.environment_variables)",
        "sglang": "from sglang.srt.environ import Envs, EnvField; "
        "print(*(n for n, v in vars(Envs).items() if isinstance(v, EnvField)))",
    }[rig.engine]
    env = {**os.environ, **rig.preset.environment}
    out = subprocess.run(
        [str(rig.preset.python), "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    names = {name for name in out.stdout.splitlines()[-1].split() if name.isupper()}
    assert len(names) > 100
    folders = package_folders(rig.preset.python)
    assert declared_variables(rig.engine, folders, names) == names
    found = by_kind(dict.fromkeys(names, "x"), rig.engine, lambda few: declared_variables(rig.engine, folders, few))
    assert found.renewed == {}
    assert names - found.matter.keys() <= KEPT
