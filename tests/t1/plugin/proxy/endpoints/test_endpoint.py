"""An existing endpoint: when it counts as up, how it is started and stopped, and what is left when a command or hook hangs, fails or
reports wrongly.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from launchers.bare import free_port
from plugin.proxy.endpoints.endpoint import EndpointSpec
from plugin.proxy.http.address import tcp, unix
from plugin.proxy.pool.start_times import Kind
from plugin.runtime.phases import Phase
from tests.kits.proxy.commands import ENGINE
from tests.kits.proxy.endpoints import SleepMode, in_front_of
from tests.kits.proxy.rig import Seen, Upstream, answer, answering, echo_request, run, until, upstream

pytestmark = pytest.mark.t1


def living(word: str) -> list[int]:
    """Return the processes with `word` in their command line that are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("by", ["url", pytest.param("command", marks=pytest.mark.slow)])
def test_a_sleeping_engine_with_a_healthy_page_is_woken(by):
    async def main():
        engine = SleepMode()
        async with upstream(engine) as up:
            base = f"http://127.0.0.1:{up.port}"
            if by == "url":
                how = {"wake_url": f"{base}/wake_up", "sleep_url": f"{base}/sleep"}
            else:
                post = f'{sys.executable} -S -c \'import http.client as h; c = h.HTTPConnection("127.0.0.1:{up.port}");'
                how = {
                    verb: post + f' c.request("POST", "{path}"); c.getresponse().read()\''
                    for verb, path in (("wake", "/wake_up"), ("sleep", "/sleep"))
                }
            spec = EndpointSpec(tcp("127.0.0.1", up.port), sleep_after_s=0.1, **how)
            async with in_front_of(spec) as (rig, endpoint):
                assert endpoint.tracker.phase is Phase.SERVING, "found up"
                for turn in range(2):
                    await until(lambda: endpoint.tracker.phase is Phase.ASLEEP)
                    got = await asyncio.gather(*(rig.get(f"/{turn}/{n}") for n in range(3)))
                    assert {a.status for a in got} == {200}
                await until(lambda: engine.calls[-1] == "/sleep")
                assert engine.calls[:4] == ["/sleep", "/wake_up"] * 2 and engine.asked_asleep == 0
                assert len(rig.pool.history.seen(Kind.WOKEN)) == 2 and not rig.pool.history.seen(Kind.COLD)
                assert [str(s.phase) for s in rig.pool.history.last[Kind.WOKEN]] == ["waking", "verifying"]
                assert rig.pool.history.last[Kind.WOKEN][0].at_s == 0

    run(main())


def test_an_engine_asleep_before_the_proxy_started_is_detected_by_a_generation():
    async def main():
        engine = SleepMode(awake=False)
        async with upstream(engine) as up:
            base = f"http://127.0.0.1:{up.port}"
            spec = EndpointSpec(
                tcp("127.0.0.1", up.port),
                wake_url=f"{base}/wake_up",
                sleep_url=f"{base}/sleep",
                ready_model="m",
            )
            async with in_front_of(spec) as (rig, endpoint):
                assert endpoint.tracker.phase is Phase.ASLEEP, "its health page does not make it serving"
                assert (await rig.get("/x")).status == 200
                assert engine.calls == ["/wake_up"] and engine.asked_asleep == 0

    run(main())


def test_a_healthy_engine_serves_only_after_a_generation():
    tries = 0

    async def warming(up: Upstream, seen: Seen, reader, writer) -> bool:
        nonlocal tries
        if seen.target == "/v1/completions":
            tries += 1
            asked = json.loads(seen.body)
            assert asked["max_tokens"] == 1 and asked["model"] == "m"
            if tries < 4:
                writer.write(answer(b"warming up", "503 Service Unavailable"))
                return True
        return await echo_request(up, seen, reader, writer)

    async def main():
        async with upstream(warming) as up:
            spec = EndpointSpec(tcp("127.0.0.1", up.port), ready_model="m")
            async with in_front_of(spec) as (rig, endpoint):
                got = await asyncio.gather(*(rig.get(f"/{n}") for n in range(5)))
                assert {a.status for a in got} == {200} and tries == 4
                first = next(n for n, s in enumerate(up.seen) if s.target not in ("/health", "/v1/completions"))
                assert sum(s.target == "/v1/completions" for s in up.seen[:first]) == 4, (
                    "held until a token was generated"
                )

    run(main())


@pytest.mark.slow
def test_a_hanging_wake_is_ended_with_its_processes():
    async def main():
        word = f"271.{free_port()}"
        spec = EndpointSpec(tcp("127.0.0.1", free_port()), wake=f"sleep {word} & sleep {word}", wake_limit_s=0.3)
        async with in_front_of(spec) as (rig, endpoint):
            waiting = asyncio.create_task(rig.get("/"))
            await until(lambda: len(living(f"sleep\0{word}")) == 2)
            got = await waiting
            assert got.status == 503 and got.json()["error"]["code"] == "wake-timeout"
            assert got.headers["retry-after"] == "1", "the pause before the next try"
            await until(lambda: not living(f"sleep\0{word}"))

    run(main())


@pytest.mark.slow
def test_a_proxy_that_ends_while_its_command_starts_leaves_nothing():
    """At every point of the command's start at which everything is cancelled."""

    async def main():
        port = free_port()
        for turns in range(12):
            word = f"273.{port}{turns:02}"
            async with in_front_of(EndpointSpec(tcp("127.0.0.1", port), wake=f"sleep {word}")) as (rig, endpoint):
                waking = asyncio.create_task(endpoint.wake())
                while endpoint.tracker.phase is Phase.ASLEEP:  # noqa: ASYNC110 - counted in turns of the loop
                    await asyncio.sleep(0)
                for _ in range(turns):
                    await asyncio.sleep(0)
                waking.cancel()
                await asyncio.gather(waking, return_exceptions=True)
            await until(lambda word=word: not living(f"sleep\0{word}"))

    run(main())


@pytest.mark.parametrize("how", [pytest.param("fails", marks=pytest.mark.slow), "hangs"])
def test_an_ineffective_sleep_command_keeps_the_engine_serving(how):
    """A command that still runs when the proxy ends does not outlive it."""

    async def main():
        word = f"272.{free_port()}"
        async with upstream() as up:
            sleep = "exit 3" if how == "fails" else f"sleep {word}"
            spec = EndpointSpec(tcp("127.0.0.1", up.port), sleep=sleep, sleep_after_s=0.05)
            async with in_front_of(spec) as (rig, endpoint):
                if how == "fails":
                    await until(lambda: rig.pool.sleeper.pause.failures >= 2)
                    assert rig.pool.sleeper.sleeps == 0
                    assert (await rig.get("/")).status == 200 and endpoint.tracker.phase is Phase.SERVING
                else:
                    await until(lambda: living(f"sleep\0{word}"))
            await until(lambda: not living(f"sleep\0{word}"))  # its process group was killed; the end may take a moment

    run(main())


def test_a_sleep_hook_that_fails_after_the_sleep_leaves_the_engine_asleep():
    async def main():
        engine = SleepMode(lies=True)
        async with upstream(engine) as up:
            base = f"http://127.0.0.1:{up.port}"
            spec = EndpointSpec(
                tcp("127.0.0.1", up.port), wake_url=f"{base}/wake_up", sleep_url=f"{base}/sleep", ready_model="m"
            )
            async with in_front_of(spec) as (rig, endpoint):
                assert await rig.pool.sleep() and endpoint.tracker.phase is Phase.ASLEEP
                assert (await rig.get("/x")).status == 200
                assert engine.calls == ["/sleep", "/wake_up"] and engine.asked_asleep == 0

    run(main())


def test_the_death_of_a_started_engine_is_detected_without_a_request():
    async def main():
        port = free_port()
        spec = EndpointSpec(tcp("127.0.0.1", port), wake=f"exec {sys.executable} -S {ENGINE} {port}")
        async with in_front_of(spec) as (rig, endpoint):
            first = (await rig.get("/")).json()["pid"]
            os.kill(first, 9)
            await until(lambda: endpoint.tracker.phase is Phase.FAILED)
            assert "engine-died" in endpoint.tracker.reason
            assert (await rig.get("/-/ready?strict=1")).status == 503
            assert (await rig.get("/-/ready")).status == 200, "a request wakes it"
            endpoint.tracker._since -= 1000.0  # it was up for a long time, and has been down for long
            endpoint.tracker._began -= 5000.0
            assert (await rig.get("/")).json()["pid"] != first
            assert rig.pool.waker.wakes == 2
            assert max(rig.pool.history.seen(Kind.COLD)) < 100, "a start is measured from its own beginning"
            spans = rig.pool.history.last[Kind.COLD]
            assert [str(s.phase) for s in spans] == ["mounting", "starting", "loading", "warming"]
            assert spans[0].at_s == 0 and spans[-1].at_s < 100
            document = (await rig.get("/-/status")).json()["pools"][0]
            assert document["replicas"][0]["timeline"][0] == document["starts"]["cold"][0]

    run(main())


@pytest.mark.slow
def test_a_wake_command_that_returns_early_is_no_death(tmp_path):
    async def main():
        port = free_port()
        spec = EndpointSpec(
            tcp("127.0.0.1", port),
            wake=f"{sys.executable} -S {ENGINE} {port} </dev/null >/dev/null 2>&1 & echo $! >{tmp_path}/pid",
            sleep=f"kill $(cat {tmp_path}/pid)",
        )
        async with in_front_of(spec) as (rig, endpoint):
            first = (await rig.get("/")).json()["pid"]
            await asyncio.sleep(0.1)
            assert endpoint.tracker.phase is Phase.SERVING
            assert await rig.pool.sleep()
            await until(lambda: not Path(f"/proc/{first}/fd/0").exists())
            assert (await rig.get("/")).json()["pid"] != first
            assert await rig.pool.sleep()

    run(main())


def test_a_start_after_a_failed_one_is_measured_from_its_own_beginning(tmp_path):
    async def main():
        port = free_port()
        wake = f"test -e {tmp_path}/ok || exit 3; exec {sys.executable} -S {ENGINE} {port}"
        async with in_front_of(EndpointSpec(tcp("127.0.0.1", port), wake=wake)) as (rig, endpoint):
            assert (await rig.get("/")).status == 503
            endpoint.tracker._since -= 1000.0
            rig.pool.replicas["default"]._began -= 1000.0
            rig.pool.waker.pause.succeeded()
            (tmp_path / "ok").touch()
            assert (await rig.get("/")).status == 200
            assert 0 < max(rig.pool.history.seen(Kind.COLD)) < 100
            assert "failed" not in [str(s.phase) for s in rig.pool.history.last[Kind.COLD]]

    run(main())


def test_a_failed_hook_is_named_in_the_answer():
    async def main():
        async with upstream(answering(answer(b"no quota", "429 Too Many Requests"))) as hook:
            spec = EndpointSpec(tcp("127.0.0.1", free_port()), wake_url=f"http://127.0.0.1:{hook.port}/scale?n=1")
            async with in_front_of(spec) as (rig, endpoint):
                error = (await rig.get("/v1/chat/completions")).json()["error"]
                assert error["code"] == "wake-hook-failed" and "429" in error["message"]
                assert [(s.method, s.target) for s in hook.seen] == [("POST", "/scale?n=1")]

    run(main())


def test_a_unix_socket_may_appear_later(tmp_path):
    async def main():
        place = tmp_path / "engine.sock"
        async with in_front_of(EndpointSpec(unix(place))) as (rig, endpoint):
            waiting = asyncio.create_task(rig.get("/x"))
            await until(lambda: rig.pool.held == 1)
            up = Upstream()
            server = await asyncio.start_unix_server(up.serve, place)
            got = await waiting
            assert got.status == 200 and [s.target for s in up.seen if s.target != "/health"] == ["/x"]
            server.close()

    run(main())


def test_the_phases_of_a_restore_behind_the_endpoint_are_followed():
    phases = ["mounting", "restoring", "waking", "verifying", "serving"]
    at = 0

    async def thawing(up: Upstream, seen: Seen, reader, writer) -> bool:
        nonlocal at
        if seen.target == "/-/ready?strict=1":
            ready = phases[at] == "serving"
            writer.write(answer(b"{}", "200 OK" if ready else "503 Service Unavailable"))
        elif seen.target == "/-/status":
            assert seen.header("authorization") == ["Bearer s3cret"]
            document = {"pools": [{"replicas": [{"phase": phases[at]}]}]}
            at = min(at + 1, len(phases) - 1)
            writer.write(answer(json.dumps(document).encode()))
        else:
            return await echo_request(up, seen, reader, writer)
        return True

    async def main():
        async with upstream(thawing) as up:
            where = {"ready_path": "/-/ready?strict=1", "admin_token": "s3cret"}
            spec = EndpointSpec(tcp("127.0.0.1", up.port), wake="true", restores=True, **where)
            async with in_front_of(spec) as (rig, endpoint):
                assert (await rig.get("/x")).status == 200
                assert [str(s.phase) for s in rig.pool.history.last[Kind.RESTORED]] == phases[:-1]
                assert rig.pool.history.guess_kind() is Kind.RESTORED

    run(main())


def test_a_start_by_others_is_not_measured():
    async def main():
        async with upstream() as up, in_front_of(EndpointSpec(tcp("127.0.0.1", up.port))) as (rig, endpoint):
            endpoint.tracker.to(Phase.FAILED, "it looked dead")
            assert (await rig.get("/x")).status == 200
            assert not any(rig.pool.history.seen(kind) for kind in Kind)

    run(main())


def test_the_answer_to_the_first_generation_reaches_no_client():
    async def refuse(up, seen, reader, writer):
        if seen.method == "POST":
            writer.write(answer(b"/models/secret", "500 Internal Server Error"))
        else:
            writer.write(answer())
        return True

    async def main():
        async with upstream(refuse) as up:
            spec = EndpointSpec(tcp("127.0.0.1", up.port), wake="exec sleep 60", ready_model="m", wake_limit_s=0.3)
            async with in_front_of(spec) as (rig, _):
                got = await rig.get("/v1/completions", method="POST", body=b"{}")
                assert got.status == 503 and got.json()["error"]["code"] == "wake-no-generation"
                assert b"secret" not in got.raw + got.body

    run(main())


class WantsKey:
    """An engine that accepts one key only on these paths."""

    def __init__(self, *paths: str, status: str = "401 Unauthorized") -> None:
        self.paths, self.status = paths, status
        self.keys: list[tuple[str, list[str]]] = []

    async def __call__(self, up: Upstream, seen: Seen, reader, writer) -> bool:
        self.keys.append((seen.target, seen.header("authorization")))
        if seen.target in self.paths and seen.header("authorization") != ["Bearer s3cret"]:
            writer.write(answer(b"no", self.status))
            return True
        return await echo_request(up, seen, reader, writer)


@pytest.mark.parametrize("key", [None, "wr0ng"])
@pytest.mark.parametrize("path", ["/v1/completions", "/health"])
@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_readiness_check_that_needs_a_key_is_reported_at_once(key, path, status, caplog):
    async def main():
        async with upstream(WantsKey(path, status=status)) as up:
            spec = EndpointSpec(tcp("127.0.0.1", up.port), ready_model="m", api_key=key)
            async with in_front_of(spec) as (rig, endpoint):
                assert endpoint.tracker.phase is Phase.ASLEEP
                got = await rig.get("/v1/x")
                error = got.json()["error"]
                assert got.status == 503 and error["code"] == "api-key-refused"
                assert status[:3] in error["message"] and "--api-key or QUICKTHAW_API_KEY" in error["message"]
                assert ("without a key" if key is None else "with the key that was given") in error["message"]
                shown = json.dumps((await rig.get("/-/status")).json()) + repr(spec) + caplog.text
                assert "wr0ng" not in shown

    run(main(), limit_s=20)


def test_a_readiness_check_with_the_key_succeeds():
    async def main():
        engine = WantsKey("/v1/completions")
        async with upstream(engine) as up:
            spec = EndpointSpec(tcp("127.0.0.1", up.port), ready_model="m", api_key="s3cret")
            async with in_front_of(spec) as (rig, endpoint):
                assert endpoint.tracker.phase is Phase.SERVING
                assert (await rig.get("/v1/x")).status == 200
                assert ("/health", []) in engine.keys, "no key is sent to a page that needs none"
                assert ("/v1/x", []) in engine.keys, "clients send their own"
                assert "s3cret" not in repr(spec)
        async with upstream(WantsKey("/health")) as up:
            spec = EndpointSpec(tcp("127.0.0.1", up.port), api_key="s3cret")
            async with in_front_of(spec) as (rig, endpoint):
                assert endpoint.tracker.phase is Phase.SERVING

    run(main())
