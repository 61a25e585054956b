"""Concurrency: replicas of one snapshot, two launches of one identity, and what must differ between them."""

import re
import threading
import time

import pytest

from launchers.bare import free_port

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
RESTORED = ["mounting", "restoring", "waking", "verifying"]


def test_four_replicas_restored_at_once_all_verify_and_share_the_requests(launch_rig):
    rig = launch_rig
    answer = rig.take()
    with rig.running("--replicas", 4, "--restore-concurrency", 4) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert started.phases() == [RESTORED] * 4
        answers = []
        threads = [
            threading.Thread(target=lambda i=i: answers.append((i, started.ask(f"prompt {i}", slow=0.3))))
            for i in range(12)
        ]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        assert len(answers) == 12
        served = [replica["served"] for replica in started.status()]
        assert min(served) >= 2, served
        text = started.ours()
    # At once: the last one begins to restore before the second one is ready. The first begins speculatively, before the others are prepared.
    restoring, serving = (positions_of(text, word) for word in ("restoring", "serving"))
    assert len(restoring) == len(serving) == 4, text
    assert max(restoring) < sorted(serving)[1], text


def positions_of(text, phase):
    """Return the positions in quickthaw's log lines where a replica reaches a phase."""
    lines = text.splitlines()
    return [i for i, line in enumerate(lines) if re.match(rf"quickthaw: replica \d+: {phase} ", line)]


def test_the_second_restore_of_a_command_line_begins_speculatively(launch_rig):
    rig, port, env = launch_rig, free_port(), {"QUICKTHAW_DEBUG": "1"}
    answer = rig.take()
    begun = []
    for _ in range(4):  # the first restore records the working set, the second saves its plan
        with rig.running(port=port, env=env) as started:
            assert started.ask() == answer
            started.wait_serving()
            assert started.phases() == [RESTORED]
            begun.append("begun speculatively" in started.ours())
    assert begun[0] is False and begun[-1] is True, begun


def test_restores_on_one_processor_are_throttled_and_all_verify(launch_rig):
    rig = launch_rig
    answer = rig.take()
    with rig.running("--replicas", 3, prefix=("taskset", "-c", "0")) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert started.phases() == [RESTORED] * 3
        text = started.ours()
    restoring, serving = (positions_of(text, word) for word in ("restoring", "serving"))
    assert len(restoring) == len(serving) == 3, text
    assert sorted(restoring + serving) == [i for pair in zip(restoring, serving, strict=True) for i in pair], text


def test_after_a_damaged_snapshot_replicas_use_the_first_ones_new_one(launch_rig):
    rig = launch_rig
    answer = rig.take()
    pages = max(rig.library.path(rig.name).glob("images/pages-*.img"), key=lambda p: p.stat().st_size)
    data = bytearray(pages.read_bytes())
    data[5000] ^= 1
    pages.write_bytes(data)
    with rig.running("--replicas", 3) as started:
        assert started.ask() == answer
        started.wait_serving()
        cold = [phases for phases in started.phases() if "starting" in phases]
        assert len(cold) == 1, started.phases()


def test_replicas_restore_from_the_first_cold_starts_snapshot(launch_rig):
    rig = launch_rig
    with rig.running("--replicas", 2) as started:
        answer = started.ask()
        started.wait_serving()
        assert started.phases()[1] == RESTORED
        assert {tuple(started.ask()) for _ in range(6)} == {tuple(answer)}


def test_of_two_launches_of_one_identity_one_writes_the_snapshot(launch_rig):
    rig = launch_rig
    env = {"ENGINE_DOUBLE_COMPILE_S": "0.5"}  # it is part of the identity
    launches = [rig.start(env=env) for _ in range(2)]
    try:
        answers = [launch.ask() for launch in launches]
        assert answers[0] == answers[1]
        [launch.wait_serving() for launch in launches]
        assert all("Traceback" not in launch.ours() for launch in launches)
        # One has taken it; the other found it in progress or complete, and continued without.
        assert len(rig.library.names()) == 1
        from checkpoint.snapshot.digests import verify

        verify(rig.library.path(rig.name), rig.library.load(rig.name).files, always=True)
        assert list(rig.library.folder.glob(".partial-*")) == []
    finally:
        assert {launch.stop() for launch in launches} <= {0, 143}
    with rig.running(env=env) as started:
        assert started.ask() == answers[0]
        assert started.phases() == [RESTORED]


def two_replicas(rig, **more):
    """Return the state that two replicas of one snapshot report, and an answer at a temperature from each."""
    found = []
    for _ in range(2):
        with rig.running(**more) as started:
            started.wait_serving()
            assert started.phases() == [RESTORED]
            sampled = started.complete(temperature=1.0)
            found.append((started.facts(), sampled["choices"][0]["token_ids"], sampled["id"]))
    return found


def test_replicas_have_different_random_numbers_in_every_process(launch_rig):
    launch_rig.take()
    (one, sampled, ident), (two, sampled_too, ident_too) = two_replicas(launch_rig)
    for process in ("server", "worker"):
        assert one[process]["pid"] == two[process]["pid"]
        assert one[process]["random"] != two[process]["random"]
        assert one[process]["torch"] != two[process]["torch"]
    assert sampled != sampled_too
    assert ident != ident_too


def test_a_seed_fixed_by_the_user_stays_fixed(launch_rig):
    seeded = {"arguments": ["--random-seed", "7"]}
    launch_rig.take(**seeded)
    (one, sampled, _), (two, sampled_too, _) = two_replicas(launch_rig, **seeded)
    for process in ("server", "worker"):
        assert one[process]["random"] == two[process]["random"]
    assert sampled == sampled_too


def test_a_running_timeout_continues_after_the_restore(launch_rig):
    """A timer that the engine armed at its start has 4 s; the snapshot is kept for longer than that before the restore."""
    rig = launch_rig
    rig.environment = {"ENGINE_DOUBLE_ARM_S": "4"}
    rig.take()
    time.sleep(4.5)
    with rig.running() as started:
        started.wait_serving()
        assert started.phases() == [RESTORED]
        assert started.facts()["worker"]["fired"] is None
        limit = time.monotonic() + 20
        while started.facts()["worker"]["fired"] is None:
            assert time.monotonic() < limit, "the clock does not advance"
            time.sleep(0.1)


def test_a_request_while_a_new_model_is_read_starts_no_second_engine(launch_rig):
    rig = launch_rig
    tokenizer = rig.folder / "tokenizer"
    tokenizer.mkdir()
    for index in range(9000):  # reading them takes a while, before the first phase that starts a process
        (tokenizer / f"{index}.txt").write_text(str(index))
    more = ["--tokenizer-path", str(tokenizer)]
    with rig.running("--sleep-after", "60s", "--no-snapshot", arguments=more) as started:
        started.ask()
        assert [phases[:3] for phases in started.phases()] == [["mounting", "starting", "loading"]]
        (mounting,) = (span["took_s"] for span in started.status()[0]["timeline"] if span["phase"] == "mounting")
        assert mounting > 0.2, "the model was read too quickly for this test"
        assert started.ours().count("mounting") == 1, started.ours()
