"""A rehearsal of a real snapshot, with the engine double: what it leaves, what it costs, and how it ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from checkpoint.sandbox import freezer
from checkpoint.snapshot import manifest, rehearsal
from checkpoint.snapshot.library import QUARANTINE_AFTER, Library
from plugin.rehearsal.rehearse import Pausing
from plugin.runtime.steps.engine_process import process_stopped
from tests.kits.launch_rig import REPO, fill, stopped_at_the_end

pytestmark = [
    *(pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow),
    pytest.mark.timeout(700),  # beside other tests, the lowest priority gets little of the processors
]
LIMIT_S = 300.0
FIRST = "this first restore records"
DONE = "rehearsed; its next restore is a fast one"


def mark_of(rig):
    return rehearsal.read(rig.library.path(rig.name), rig.library.load(rig.name))


def wait_until(what, limit_s=LIMIT_S):
    limit = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return found


def spoil(rig):
    """Give the snapshot a canary that no engine answers."""
    file = rig.library.path(rig.name) / manifest.FILE_NAME
    found = rig.library.load(rig.name)
    canary = msgspec.structs.replace(found.canary, token_ids=[number + 1 for number in found.canary.token_ids])
    file.write_bytes(manifest.dump(msgspec.structs.replace(found, canary=canary)))


def ordered(rig, **more):
    """The process that rehearses for a launch, with its order on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-m", "plugin.rehearsal.process"],
        env=rig.env(),
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps({"home": str(rig.home), "name": rig.name, **more}) + "\n")
    process.stdin.flush()
    return process


def restoring(rig):
    return list((rig.home / "run").glob("restore-*"))


def test_by_hand_it_leaves_the_working_set_the_plans_and_the_mark(launch_rig):
    rig = launch_rig
    rig.take()
    folder = rig.library.path(rig.name)
    assert mark_of(rig) is None and not rig.library.working_set(rig.name).exists()
    done = rig.cli("snapshot", "rehearse", rig.name, "--json")
    assert done.returncode == 0, done.stderr
    asked = json.loads(done.stdout)["requests"]
    assert asked[:3] == ["short", "streamed", "long"] and asked[-1].startswith("batch of ")
    assert mark_of(rig).requests == asked
    assert rig.library.working_set(rig.name).exists()
    assert rehearsal.prepared_here(folder, rig.library.load(rig.name))
    assert rig.watch.gone() == set()
    before = mark_of(rig)
    assert rig.cli("snapshot", "rehearse", rig.name).returncode == 0  # nothing is left to do
    assert mark_of(rig) == before


def test_a_launch_rehearses_its_snapshot_and_pushes_it(launch_rig, tmp_path):
    rig = launch_rig
    words = ("--rehearse", "--snapshot-store", "store")  # relative to the launch's folder
    with rig.running(*words, cwd=tmp_path) as started:
        answer = started.ask()
        started.wait_for(DONE, LIMIT_S)
        started.wait_for("pushed (", LIMIT_S)
        assert started.ask() == answer
    assert (tmp_path / "store").is_dir()
    with rig.running(*words, cwd=tmp_path) as started:
        assert started.ask() == answer
        assert "restoring" in started.phases()[0] and FIRST not in started.text()
    rig.fresh_home()
    with rig.running(*words, cwd=tmp_path) as started:  # the mark and the working set travel
        assert started.ask() == answer
        assert "restoring" in started.phases()[0] and FIRST not in started.text()
        started.wait_for(DONE, LIMIT_S)  # this host gets its plans
        assert mark_of(rig) is not None


@pytest.mark.parametrize("option", ["--standby-after", "--sleep-after"])
def test_an_engine_that_rests_at_once_is_rehearsed_too(launch_rig, option):
    rig = launch_rig
    with rig.running("--rehearse", option, "0.3s") as started:
        answer = started.ask()
        started.wait_for(DONE, LIMIT_S)
        assert mark_of(rig) is not None
        assert started.ask() == answer


def test_without_lazy_restores_it_records_nothing(launch_rig):
    rig = launch_rig
    with rig.running("--rehearse", "--no-lazy") as started:
        started.ask()
        started.wait_for(DONE, LIMIT_S)
    assert mark_of(rig) is not None and not rig.library.working_set(rig.name).exists()


def test_the_end_of_the_launch_ends_it_at_once(launch_rig):
    rig = launch_rig
    with rig.running("--rehearse") as started:
        started.ask()
        started.wait_serving()
        wait_until(lambda: restoring(rig))
        began = time.monotonic()
        started.stop()
        assert time.monotonic() - began < 20
    assert rig.watch.gone(5) == set()
    assert mark_of(rig) is None and not rig.library.health(rig.name).failures


def test_a_killed_launch_leaves_no_rehearsal(launch_rig):
    rig = launch_rig
    started = rig.start("--rehearse")
    started.ask()
    started.wait_serving()
    wait_until(lambda: restoring(rig))
    started.process.kill()
    started.process.wait()
    rig.watch.gone(20)
    rig.library.sweep()
    assert rig.watch.gone(5) == set()


def test_it_pauses_while_a_request_is_there(launch_rig):
    rig = launch_rig
    with rig.running("--rehearse") as started:
        started.ask()
        started.wait_for("rehearsing it beside the engine")
        started.complete(slow=6)
        assert DONE not in started.text()
        started.wait_for(DONE, LIMIT_S)


def advances(pid):
    """Whether a busy process gets a processor."""

    def ticks():
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    before, limit = ticks(), time.monotonic() + 0.3
    while ticks() == before:
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def tree():
    """A process with two children, of which one is stopped; the numbers of all three."""
    busy = "while True: pass"
    code = f"import subprocess, sys, time; [print(subprocess.Popen([sys.executable, '-c', {busy!r}]).pid, flush=True) for _ in '12']; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        children = [int(process.stdout.readline()) for _ in range(2)]
        os.kill(children[1], signal.SIGSTOP)
        wait_until(lambda: process_stopped(children[1]))
        yield process.pid, *children
        for pid in (*children, process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("by_signals", [False, True])
def test_a_pause_stops_an_engine_and_continues_what_it_stopped(tree, by_signals, monkeypatch):
    if by_signals:
        monkeypatch.setattr(freezer, "own_cgroup", lambda: None)
    init, running, stopped = tree
    pausing = Pausing()
    pausing.set(True)
    pausing.begin(init)  # an engine that comes up meanwhile
    for _ in range(2):
        assert not advances(running)
        pausing.set(True)
        pausing.set(False)
        wait_until(lambda: advances(running))
        assert process_stopped(stopped) and not process_stopped(init)
        pausing.set(True)
    pausing.set(False)
    pausing.over()
    pausing.set(True)
    wait_until(lambda: advances(running))


def test_what_does_not_stand_still_runs_on_and_the_rehearsal_goes_on(tree, monkeypatch):
    monkeypatch.setattr("plugin.rehearsal.rehearse.FREEZE_LIMIT_S", 0.0)
    monkeypatch.setattr(freezer, "own_cgroup", lambda: None)
    monkeypatch.setattr(freezer, "state", lambda pid: "D")
    init, running, _ = tree
    pausing = Pausing()
    pausing.begin(init)
    pausing.set(True)
    wait_until(lambda: advances(running))


def test_a_full_disk_costs_the_rehearsal_only(outside, small_disk):
    rig = outside
    small_disk("512m")
    rig.take()
    fill(rig.home)
    done = rig.cli("snapshot", "rehearse", rig.name)
    assert done.returncode == 1 and "disk-full" in done.stderr, done.stderr
    assert mark_of(rig) is None and not rig.library.health(rig.name).failures and not restoring(rig)
    (rig.home / "ballast").unlink()
    assert rig.cli("snapshot", "rehearse", rig.name).returncode == 0


@pytest.fixture
def small_group():
    """A control group with 400 MB of memory, which leaves no room for a second engine; its file of processes."""
    base = next(Path("/sys/fs/cgroup") / name for name in ("memory", ".") if Path("/sys/fs/cgroup", name).is_dir())
    group = base / f"quickthaw-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.max" if base.name == "cgroup" else "memory.limit_in_bytes"
        (group / limit).write_text(str(400 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control groups can be made here: {error}")
    yield group / "cgroup.procs"
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_it_is_given_up_where_memory_is_short(launch_rig, small_group):
    rig = launch_rig
    rig.take()
    within = ("sh", "-c", f'echo $$ > {small_group} && exec "$@"', "sh")
    done = rig.cli("snapshot", "rehearse", rig.name, prefix=within)
    assert done.returncode == 1 and "memory-short" in done.stderr, done.stderr
    assert not rig.library.health(rig.name).failures and mark_of(rig) is None and rig.watch.gone() == set()


def test_what_answers_otherwise_is_not_offered_and_taken_again(launch_rig):
    rig = launch_rig
    answer = rig.take()
    spoil(rig)
    before = rig.library.load(rig.name).digest
    done = rig.cli("snapshot", "rehearse", rig.name)
    assert done.returncode == 1 and "rehearsal-failed" in done.stderr and "canary-differs" in done.stderr
    health = rig.library.health(rig.name)
    assert health.failures >= QUARANTINE_AFTER and health.reason.startswith("rehearsal-failed: canary-differs")
    assert mark_of(rig) is None and rig.watch.gone() == set()
    with rig.running() as started:
        assert started.ask() == answer
        assert "restoring" not in started.phases()[0]
    assert rig.library.load(rig.name).digest != before and not rig.library.health(rig.name).failures


def test_only_one_rehearses_a_snapshot(launch_rig):
    rig = launch_rig
    rig.take()
    with rehearsal.lock(rig.library.path(rig.name)):
        done = rig.cli("snapshot", "rehearse", rig.name)
    assert done.returncode == 1 and "rehearsal-running" in done.stderr
    assert not rig.library.health(rig.name).failures


def test_a_snapshot_that_is_removed_meanwhile_stays_removed(launch_rig):
    rig = launch_rig
    rig.take()
    name = rig.name
    process = ordered(rig)
    wait_until(lambda: restoring(rig))
    wait_until(lambda: rig.cli("snapshot", "rm", name).returncode == 0)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert json.loads(said.splitlines()[-1])["event"] == "given-up"
    assert not rig.library.names() and not rig.library.health(name).failures
    assert rig.watch.gone() == set()


def test_its_owner_s_end_ends_it(launch_rig):
    rig = launch_rig
    rig.take()
    process = ordered(rig)
    wait_until(lambda: restoring(rig))
    process.communicate(timeout=60)  # closes its standard input
    assert process.returncode == 1
    assert rig.watch.gone(5) == set()


def test_it_ends_well_while_its_owner_still_holds_its_input_open(launch_rig):
    """The thread that waits for the owner's words holds no lock that the interpreter needs at its end."""
    launch_rig.take()
    process = ordered(launch_rig)
    assert process.wait(LIMIT_S) == 0
    said, _ = process.communicate()
    assert json.loads(said.splitlines()[-1])["event"] == "rehearsed"


def engine_words(rig):
    return ("--engine-python", rig.python, rig.engine, "--model-path", rig.model)


def test_create_takes_rehearses_and_pushes_without_a_port(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "store"
    words = engine_words(rig)
    name = rig.cli("snapshot", "key", *words).stdout.strip()
    assert not rig.library.names()
    weights = tmp_path / "weights"
    done = rig.cli("snapshot", "create", "--json", "--snapshot-store", store, "--store", weights, *words)
    assert list((weights / "manifests").iterdir())  # the model is in its store, too
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["name"] == name == rig.name and made["taken"] and made["pushed_bytes"] > 0
    assert mark_of(rig).requests == made["requests"]
    assert rig.watch.gone() == set()
    again = rig.cli("snapshot", "create", "--json", "--snapshot-store", store, *words)
    assert json.loads(again.stdout) == {**made, "taken": False, "pushed_bytes": 0}
    with rig.running() as started:  # the launch with these arguments restores it
        started.ask()
        assert "restoring" in started.phases()[0] and FIRST not in started.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("moment", ["quickthaw: loading", FIRST])
def test_a_signal_ends_create_with_its_engine(launch_rig, number, moment):
    rig = launch_rig
    env = {"ENGINE_DOUBLE_COMPILE_S": "60"} if moment != FIRST else {}
    words = ["snapshot", "create", *map(str, engine_words(rig))]
    log = rig.folder / "log"
    with log.open("wb") as out:
        creating = subprocess.Popen(
            [sys.executable, "-m", "plugin", *words], env=rig.env(**env), cwd=REPO, stdout=out, stderr=out
        )
    try:
        limit = time.monotonic() + 60
        while moment not in log.read_text():
            assert creating.poll() is None and time.monotonic() < limit, log.read_text()
            time.sleep(0.02)
        creating.send_signal(number)
        assert creating.wait(30) == 128 + number, log.read_text()
    finally:
        creating.kill()
        creating.wait(10)
    assert "Traceback" not in log.read_text(), log.read_text()
    assert rig.watch.gone() == set()


def test_create_fails_with_a_code_where_no_snapshot_can_be(launch_rig):
    rig = launch_rig
    done = rig.cli("snapshot", "create", *engine_words(rig), QUICKTHAW_CRIU="/nowhere/criu")
    assert done.returncode != 0 and "capability-off" in done.stderr, done.stderr
    done = rig.cli("snapshot", "create", "vllm", "serve", "--headless")
    assert done.returncode == 1 and "run-as-given" in done.stderr, done.stderr
    assert not rig.library.names() and rig.watch.gone() == set()


def test_a_pulled_snapshot_is_prepared_without_a_restore(launch_rig, tmp_path):
    rig, store = launch_rig, tmp_path / "store"
    assert rig.cli("snapshot", "create", "--snapshot-store", store, *engine_words(rig)).returncode == 0
    name, made = rig.name, rig.library.path(rig.name) / ".mapped"
    plans = {file.name for file in made.parent.rglob(".verified-*")}
    rig.fresh_home()
    done = rig.cli("snapshot", "pull", name, store)
    assert done.returncode == 0 and "slower" not in done.stderr, done.stderr
    folder = rig.library.path(name)
    assert {file.name for file in folder.rglob(".verified-*")} == plans
    assert rehearsal.prepared_here(folder, rig.library.load(name)) and mark_of(rig) is not None
    (file,) = folder.rglob(".verified-plans")
    before = file.stat()
    with rig.running() as started:
        started.ask()
        assert "restoring" in started.phases()[0] and FIRST not in started.text()
    assert os.path.samestat(file.stat(), before)  # they were used: what is not used is made again
    assert rig.cli("snapshot", "verify", name).returncode == 0


def test_what_it_starts_inherits_the_lowest_priority_and_leaves_no_group():
    code = """
import os, subprocess, sys
from plugin.rehearsal import priority
priority.lower_own()
child = "import os; os.setsid(); print(open('/proc/self/cgroup').read(), os.sched_getscheduler(0) == os.SCHED_IDLE)"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
priority.leave_group()
print(open("/proc/self/cgroup").read())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, check=True
    )
    child, _, after = done.stdout.partition("True")
    assert after and "quickthaw-rehearsal-" not in after
    groups = [line.split(":", 2)[2].lstrip("/") for line in child.splitlines() if "quickthaw-rehearsal-" in line]
    assert not [group for group in groups for base in ("cpu", ".") if Path("/sys/fs/cgroup", base, group).exists()]


def test_of_two_hosts_that_start_cold_at_once_one_takes_the_snapshot_and_the_other_gets_it_from_the_store(
    launch_rig, tmp_path
):
    store, homes = tmp_path / "store", [launch_rig.home, tmp_path / "other"]
    homes[1].mkdir()
    launch_rig._criu(homes[1])
    words = ("--rehearse", "--snapshot-store", store)

    def running(home):
        started = launch_rig.start(*words, env={"QUICKTHAW_HOME": str(home), "QUICKTHAW_REHEARSE": None})
        return stopped_at_the_end(started)

    with running(homes[0]) as one, running(homes[1]) as two:
        answers = {one.ask()[0], two.ask()[0]}
        for started in (one, two):
            started.wait_serving()
        left = [started for started in (one, two) if "makes it for the store; this launch takes none" in started.ours()]
        assert len(answers) == len(left) == 1, (one.ours(), two.ours())
        (maker,) = {one, two} - set(left)
        maker.wait_for("pushed (", LIMIT_S)
        wait_until(lambda: not list((store / "claims").rglob("*-*")))
    assert sorted(len(Library(home).names()) for home in homes) == [0, 1]
    (without,) = [home for home in homes if not Library(home).names()]
    with running(without) as again:
        assert again.ask()[0] in answers
        assert again.phases()[0][:2] == ["mounting", "restoring"], again.ours()


def test_two_node_pools_with_other_processors_keep_a_snapshot_each_in_one_store(launch_rig, tmp_path):
    """Neither can restore the other's: each makes the one that it misses, and neither replaces the other's."""
    info = Path("/proc/cpuinfo").read_text()
    pools = {}
    for name in ("pool-a", "pool-b"):
        (tmp_path / name).write_text(re.sub(r"(?m)^(flags\s*:.*)$", rf"\1 only_on_{name}", info))
        script = f'mount --bind {tmp_path / name} /proc/cpuinfo && exec "$@"'
        pools[name] = ["unshare", "--mount", "sh", "-c", script, "sh"]
    words = ("--rehearse", "--snapshot-store", tmp_path / "store")
    answers = set()
    for name, prefix in pools.items():
        launch_rig.fresh_home(f"first-of-{name}")
        with launch_rig.running(*words, prefix=prefix) as started:
            answers.add(started.ask()[0])
            assert started.phases()[0][:2] == ["mounting", "starting"], started.ours()
            refused = "cpu-features-missing: only_on_pool-a" in started.ours()
            assert refused is (name == "pool-b"), started.ours()
            started.wait_for("pushed (", LIMIT_S)
    for name, prefix in pools.items():
        launch_rig.fresh_home(f"second-of-{name}")
        with launch_rig.running(*words, prefix=prefix) as started:
            answers.add(started.ask()[0])
            assert started.phases()[0][:2] == ["mounting", "restoring"], started.ours()
    assert len(answers) == 1
    stored = [path.name for path in (tmp_path / "store" / "refs" / "snapshots").iterdir()]
    refs = sorted(name.partition("@")[2] for name in stored if not name.startswith("compile-"))
    assert refs[0] == "" and len(set(refs)) == len(refs) == 3, refs  # the one pushed last, and one of each pool
