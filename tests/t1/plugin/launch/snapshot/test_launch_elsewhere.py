"""What a restored engine finds out about the host it is on by then, as docs/limits.md says it (After a restore)."""

import os
import time

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("launch")]

WITHOUT_NICE = ["setpriv", "--bounding-set", "-sys_nice"]


def surroundings(started):
    return started.facts()["server"]["surroundings"]


def test_a_restored_engine_sees_the_host_it_is_on(launch_rig, tmp_path):
    env = {"ENGINE_DOUBLE_ALARM_S": "7200", "TZ": "Asia/Tokyo"}
    with launch_rig.running(env=env) as started:
        answer = started.ask()
        started.wait_serving()
        before = surroundings(started)
    hosts, resolver = tmp_path / "hosts", tmp_path / "resolver"
    hosts.write_text("127.0.0.1 localhost\n10.9.8.7 registry\n")
    resolver.write_text("nameserver 10.9.8.1\n")
    script = f"hostname elsewhere && mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf"
    cpu = max(os.sched_getaffinity(0))
    prefix = ["unshare", "--uts", "--mount", "taskset", "-c", str(cpu), "sh", "-c", f'{script} && exec "$@"', "sh"]
    with launch_rig.running(prefix=prefix, env=env) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring", started.ours()
        now = surroundings(started)
    assert before["host"] != "elsewhere" and now["host"] == "elsewhere"
    assert (now["hosts"], now["resolver"]) == (hosts.read_text(), resolver.read_text())
    assert (now["zone"], before["zone"]) == ("JST", "JST")
    assert abs(now["time"] - time.time()) < 60
    assert 7000 < now["alarm_s"] < 7200
    assert (now["cpus"], now["affinity"]) == (os.cpu_count(), [cpu])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["choom", "-n", "0", "--"], ["choom", "-n", "500", "--"]),
        (["choom", "-n", "500", "--"], []),
        (WITHOUT_NICE, [*WITHOUT_NICE, "nice", "-n", "5"]),
        (WITHOUT_NICE, []),
        ([], ["prlimit", "--nofile=1024:4096"]),
        ([], ["prlimit", "--nproc=2000:2000", "--memlock=65536:65536"]),
    ],
    ids=["oom-higher", "oom-lower", "nice", "capabilities", "files", "limits"],
)
def test_what_a_container_allows_may_differ_at_the_restore(launch_rig, then, now):
    answer = launch_rig.take(prefix=then)
    with launch_rig.running(prefix=now) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring" and "failed" not in started.ours(), started.ours()
        found = surroundings(started)
    if "choom" in str([then, now]):
        assert found["oom_score_adj"] == (500 if now else 0)


def test_the_mode_of_a_file_that_the_engine_has_mapped_is_no_content(launch_rig):
    answer = launch_rig.take()
    (mapped,) = (launch_rig.home / "compile").rglob("kernel.so")
    for mode in (0o600, 0o755):
        mapped.chmod(mode)
        with launch_rig.running() as started:
            assert started.ask() == answer
            assert started.phases()[0][1] == "restoring" and "failed" not in started.ours(), started.ours()


def test_a_container_with_fewer_capabilities_takes_the_snapshot_anew(launch_rig):
    answer = launch_rig.take()
    with launch_rig.running(prefix=WITHOUT_NICE) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "capabilities-fewer" in started.ours() and "taking it again" in started.ours(), started.ours()
    for prefix in (WITHOUT_NICE, ()):
        with launch_rig.running(prefix=prefix) as started:
            assert started.ask() == answer
            assert started.phases()[0][1] == "restoring" and "failed" not in started.ours(), started.ours()
