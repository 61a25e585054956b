"""Many at once: replicas of one snapshot, two launches of one identity, and what must differ between them."""

import re
import threading
import time

import pytest

from launchers.bare import free_port

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
RESTORED = ["mounting", "restoring", "waking", "verifying"]


def test_four_replicas_restored_at_the_same_moment_all_verify_and_share_the_work(launch_rig):
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
    # At the same moment: the last begins to restore before the first is done.
    restoring, serving = (lines_with(text, word) for word in ("restoring", "serving"))
    assert len(restoring) == len(serving) == 4, text
    assert max(restoring) < min(serving), text


def lines_with(text, phase):
    """Where in our own words a replica reaches a phase."""
    lines = text.splitlines()
    return [i for i, line in enumerate(lines) if re.match(rf"quickthaw: replica \d+: {phase} ", line)]


def test_the_same_command_line_is_begun_beforehand_from_its_second_restore_on(launch_rig):
    rig, port, env = launch_rig, free_port(), {"QUICKTHAW_DEBUG": "1"}
    answer = rig.take()
    begun = []
    for _ in range(4):  # the first records the working set, the second notes what it was told
        with rig.running(port=port, env=env) as started:
            assert started.ask() == answer
            started.wait_serving()
            assert started.phases() == [RESTORED]
            begun.append("begun speculatively" in started.ours())
    assert begun[0] is False and begun[-1] is True, begun


def test_replicas_that_share_a_processor_are_restored_in_turns_and_all_verify(launch_rig):
    rig = launch_rig
    answer = rig.take()
    with rig.running("--replicas", 3, prefix=("taskset", "-c", "0")) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert started.phases() == [RESTORED] * 3
        text = started.ours()
    restoring, serving = (lines_with(text, word) for word in ("restoring", "serving"))
    assert len(restoring) == len(serving) == 3, text
    assert sorted(restoring + serving) == [i for pair in zip(restoring, serving, strict=True) for i in pair], text


def test_replicas_whose_snapshot_is_damaged_come_from_the_one_that_the_first_takes(launch_rig):
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


def test_replicas_follow_the_first_cold_start(launch_rig):
    rig = launch_rig
    with rig.running("--replicas", 2) as started:
        answer = started.ask()
        started.wait_serving()
        assert started.phases()[1] == RESTORED
        assert {tuple(started.ask()) for _ in range(6)} == {tuple(answer)}


def test_two_launches_of_one_identity_and_one_writer(launch_rig):
    rig = launch_rig
    env = {"ENGINE_DOUBLE_COMPILE_S": "0.5"}  # it counts in the identity
    launches = [rig.start(env=env) for _ in range(2)]
    try:
        answers = [launch.ask() for launch in launches]
        assert answers[0] == answers[1]
        [launch.wait_serving() for launch in launches]
        assert all("Traceback" not in launch.ours() for launch in launches)
        # One has taken it; the other met it being taken, or there already, and went on without.
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
    """The double's own words from two replicas of one snapshot, and an answer at a temperature from each."""
    found = []
    for _ in range(2):
        with rig.running(**more) as started:
            started.wait_serving()
            assert started.phases() == [RESTORED]
            sampled = started.complete(temperature=1.0)
            found.append((started.facts(), sampled["choices"][0]["token_ids"], sampled["id"]))
    return found


def test_no_two_replicas_draw_the_same_numbers_in_any_process(launch_rig):
    launch_rig.take()
    (one, sampled, ident), (two, sampled_too, ident_too) = two_replicas(launch_rig)
    for process in ("server", "worker"):
        assert one[process]["pid"] == two[process]["pid"]
        assert one[process]["random"] != two[process]["random"]
        assert one[process]["torch"] != two[process]["torch"]
    assert sampled != sampled_too
    assert ident != ident_too


def test_a_seed_that_the_user_fixed_stays_fixed(launch_rig):
    seeded = {"arguments": ["--random-seed", "7"]}
    launch_rig.take(**seeded)
    (one, sampled, _), (two, sampled_too, _) = two_replicas(launch_rig, **seeded)
    for process in ("server", "worker"):
        assert one[process]["random"] == two[process]["random"]
    assert sampled == sampled_too


def test_a_timeout_that_was_running_at_the_dump_runs_on_and_does_not_fire_at_once(launch_rig):
    """A timer of the engine's, armed at its start; it has 4 s, the snapshot lies for longer than that."""
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
            assert time.monotonic() < limit, "the clock stands still"
            time.sleep(0.1)


def test_a_request_that_comes_while_a_new_model_is_read_starts_nothing_of_its_own(launch_rig):
    rig = launch_rig
    with (rig.model / "more.bin").open("wb") as file:
        file.truncate(3 << 30)  # reading it once takes a second or two, before the first phase that starts anything
    with rig.running("--idle-timeout", "60s", "--no-snapshot") as started:
        started.ask()
        assert [phases[:3] for phases in started.phases()] == [["mounting", "starting", "loading"]]
        (mounting,) = (span["took_s"] for span in started.status()[0]["timeline"] if span["phase"] == "mounting")
        assert mounting > 0.2, "the model was read too quickly for this test"
        assert started.ours().count("mounting") == 1, started.ours()
