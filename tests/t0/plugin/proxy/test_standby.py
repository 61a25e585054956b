"""The ladder of sleep in one pool: serving, standby, asleep, and what moves a pool along it."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from plugin.proxy.admin.actions import act, pool_named
from plugin.proxy.endpoints import admission
from plugin.proxy.endpoints.admission import Admission, Member
from plugin.proxy.endpoints.models_file import Bytes
from plugin.proxy.errors import ClientFault, ProxyError, StartFailed
from plugin.proxy.http.address import from_url
from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.pressure import longest_in_standby, memory_room, relieve, shortage
from plugin.proxy.pool.start_times import Kind
from plugin.rehearsal import memory
from plugin.runtime.phases import IllegalTransition, Phase, PhaseTracker
from plugin.runtime.standby.moves import Moves

pytestmark = pytest.mark.t0


def restore(tracker):
    """Move it through the phases of a restore, up to serving."""
    for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
        tracker.to(phase)


class Engine:
    """A pool whose replica moves as its hooks say. `refuses`: the hooks that fail."""

    def __init__(self, name="m", refuses=(), **settings):
        self.tracker, self.moves, self.refuses = PhaseTracker(), [], set(refuses)
        self.gate = asyncio.Event()
        self.gate.set()
        restore(self.tracker)
        hooks = {
            "wake": self._hook("wake", Phase.WAKING, Phase.SERVING),
            "standby": self._hook("standby", Phase.STANDBY),
            "sleep": self._hook("sleep", Phase.ASLEEP),
        }
        self.pool = ReplicaPool(name=name, **hooks, **settings)
        self.replica = self.pool.add("r0", self.tracker, from_url("http://127.0.0.1:1"))
        self.pool.bind(asyncio.get_running_loop())

    def _hook(self, what, *phases):
        async def move():
            self.moves.append(what)
            await self.gate.wait()
            if what in self.refuses:
                raise StartFailed(f"no-{what}", f"{what} is refused")
            for phase in phases:
                self.tracker.to(phase)
            await asyncio.sleep(0)

        return move


@contextlib.asynccontextmanager
async def watched(engine):
    task = asyncio.get_running_loop().create_task(engine.pool.sleeper.watch_idle())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - phases move in any thread
            await asyncio.sleep(0.005)


async def on_the_way_to_standby():
    """Return an engine that moves to standby until its gate opens, and the task of that move."""
    engine = Engine()
    engine.gate.clear()
    moving = asyncio.ensure_future(engine.pool.sleeper.standby())
    await until(lambda: engine.moves == ["standby"])
    return engine, moving


def test_only_a_serving_replica_stands_by_and_it_wakes_or_sleeps():
    tracker = PhaseTracker()
    with pytest.raises(IllegalTransition):
        tracker.to(Phase.STANDBY)
    restore(tracker)
    tracker.to(Phase.STANDBY)
    with pytest.raises(IllegalTransition):
        tracker.to(Phase.SERVING)
    tracker.to(Phase.WAKING)
    tracker.to(Phase.SERVING)
    assert [span.phase for span in tracker.timeline] == [Phase.WAKING], "a start of its own"
    tracker.to(Phase.STANDBY)
    tracker.to(Phase.ASLEEP)


def test_an_idle_pool_goes_down_the_ladder_and_a_request_brings_it_up():
    async def check():
        engine = Engine(standby_after_s=0.05, sleep_after_s=0.2)
        async with watched(engine):
            await until(lambda: engine.tracker.phase is Phase.ASLEEP)
            assert engine.moves == ["standby", "sleep"]
            restore(engine.tracker)
            await until(lambda: engine.tracker.phase is Phase.STANDBY)
            replica = await engine.pool.acquire()
            assert engine.moves[-1] == "wake" and replica.start_kind is Kind.WOKEN
            await asyncio.sleep(0.3)
            assert engine.tracker.phase is Phase.SERVING, "it answers a request"
            engine.pool.release(replica)

    asyncio.run(check())


def test_a_request_that_arrives_on_the_way_waits_and_is_answered_afterwards():
    async def check():
        engine, moving = await on_the_way_to_standby()
        waiting = asyncio.ensure_future(engine.pool.acquire())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        engine.gate.set()
        assert await moving and (await waiting).name == "r0"
        assert engine.moves == ["standby", "wake"]

    asyncio.run(check())


def test_a_pool_that_cannot_stand_by_still_goes_to_sleep():
    async def check():
        engine = Engine(refuses={"standby"}, standby_after_s=0.02, sleep_after_s=0.3)
        async with watched(engine):
            await until(lambda: engine.tracker.phase is Phase.ASLEEP)
        assert engine.moves == ["standby", "sleep"], "a failed standby is tried again after a pause of its own"

    asyncio.run(check())


def test_adapters_are_kept_in_standby_and_keep_the_engine_from_sleep():
    async def check():
        engine = Engine()
        engine.replica.adapters_loaded = True
        assert not await engine.pool.sleeper.sleep()
        assert await engine.pool.sleeper.standby()
        with pytest.raises(ProxyError) as refused:
            await engine.pool.sleeper.evict(standby=False)
        assert refused.value.code == "adapters-loaded" and engine.tracker.phase is Phase.STANDBY
        engine.pool.release(await engine.pool.acquire())
        assert engine.replica.adapters_loaded
        engine.tracker.to(Phase.FAILED)
        await asyncio.sleep(0.01)
        assert not engine.replica.adapters_loaded

    asyncio.run(check())


def test_a_sleep_that_is_asked_for_on_the_way_to_standby_follows_it():
    async def check():
        engine, moving = await on_the_way_to_standby()
        asked = asyncio.ensure_future(act(engine.pool, "sleep"))
        await asyncio.sleep(0.02)
        assert not asked.done()
        engine.gate.set()
        assert await moving and await asked == "asleep"
        assert engine.moves == ["standby", "sleep"]

    asyncio.run(check())


def test_a_request_on_the_way_to_standby_is_answered_before_a_sleep_that_is_asked_for():
    async def check():
        engine, moving = await on_the_way_to_standby()
        asked = asyncio.ensure_future(act(engine.pool, "sleep"))
        waiting = asyncio.ensure_future(engine.pool.acquire())
        await asyncio.sleep(0.02)
        engine.gate.set()
        replica = await waiting
        assert await moving and not asked.done()
        await asyncio.sleep(0.1)
        assert engine.moves == ["standby", "wake"] and not asked.done()
        engine.pool.release(replica)
        assert await asked == "asleep" and engine.moves == ["standby", "wake", "sleep"]

    asyncio.run(check())


def test_a_wake_ends_with_the_phase_that_its_hook_has_just_reached():
    """A worker's report that the dead engine refused it may come during the wake."""

    async def check():
        engine = Engine()
        engine.tracker.to(Phase.FAILED)

        async def wake():
            for _ in range(2):
                engine.pool.refused(engine.replica, engine.replica.generation, "a worker could not connect")
            restore(engine.tracker)

        engine.pool.waker.hook = wake
        async with asyncio.timeout(5):
            assert (await engine.pool.acquire()).name == "r0"

    asyncio.run(check())


def test_a_wake_that_finds_nothing_to_do_waits_for_the_end_of_an_engine_that_refuses():
    """Two requests find it dead, the second during the wake for the first, before its owner does."""

    async def check():
        engine, wakes = Engine(), []

        async def wake():
            wakes.append(engine.tracker.phase)
            if len(wakes) == 1:
                engine.pool.refused(engine.replica, engine.replica.generation, "the second")
            elif engine.tracker.phase is Phase.FAILED:
                restore(engine.tracker)

        engine.pool.waker.hook = wake
        engine.pool.refused(engine.replica, engine.replica.generation, "the first")
        waiting = asyncio.ensure_future(engine.pool.acquire())
        await asyncio.sleep(0.05)
        assert not waiting.done() and wakes == [Phase.SERVING] * 2
        engine.tracker.to(Phase.FAILED)
        async with asyncio.timeout(5):
            assert (await waiting).name == "r0"

    asyncio.run(check())


@pytest.mark.parametrize(("deaths", "answered"), [(2, True), (9, False)])
def test_an_engine_that_dies_as_soon_as_it_serves_is_woken_again_a_few_times(deaths, answered):
    async def check():
        engine, wakes = Engine(), []
        engine.tracker.to(Phase.FAILED)

        async def wake():
            wakes.append(1)
            restore(engine.tracker)
            if len(wakes) <= deaths:
                engine.tracker.to(Phase.FAILED)

        engine.pool.waker.hook = wake
        async with asyncio.timeout(5):
            if answered:
                assert (await engine.pool.acquire()).name == "r0" and len(wakes) == deaths + 1
            else:
                with pytest.raises(StartFailed) as refused:
                    await engine.pool.acquire()
                assert refused.value.code == "wake-without-replica" and len(wakes) == 4

    asyncio.run(check())


def test_a_wake_waits_for_the_end_of_an_engine_that_died_a_moment_ago():
    async def check():
        started = []
        tracker = PhaseTracker(phase=Phase.FAILED)
        replica = SimpleNamespace(tracker=tracker, running="dead", stop_requested=False)
        replica.start = lambda: started.append(replica.running)
        waking = asyncio.ensure_future(Moves([replica], started.append, lambda: None).wake())
        await asyncio.sleep(0.05)
        assert not waking.done()
        replica.running = None  # its owner has cleared it away
        async with asyncio.timeout(5):
            await waking
        assert started == [None]

    asyncio.run(check())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_pool_that_cannot_stand_by_makes_room_by_sleep_unless_that_would_lose_adapters(adapters):
    async def check():
        engine = Engine(refuses={"standby"})
        engine.pool.sleeper.evicts_to_standby = True
        engine.replica.adapters_loaded = adapters
        if adapters:
            with pytest.raises(StartFailed, match="standby is refused"):
                await engine.pool.sleeper.evict()
            assert engine.tracker.phase is Phase.SERVING and engine.pool.ready() is engine.replica
        else:
            await engine.pool.sleeper.evict()
            assert engine.tracker.phase is Phase.ASLEEP

    asyncio.run(check())


def test_moves_by_hand_have_nothing_to_do_where_less_is_held_already():
    async def check():
        engine = Engine()
        assert [await act(engine.pool, action) for action in ("standby", "standby", "sleep", "standby")] == [
            "standby",
            "standby",
            "asleep",
            "asleep",
        ]
        assert engine.moves == ["standby", "sleep"]
        with pytest.raises(ClientFault) as unknown:
            pool_named([engine.pool], "other")
        assert unknown.value.code == "model-not-found" and pool_named([engine.pool], "m") is engine.pool

    asyncio.run(check())


def test_short_memory_puts_the_longest_idle_in_standby_to_sleep_and_spares_what_no_snapshot_restores():
    async def check():
        first, second, lone = Engine("first"), Engine("second"), Engine("lone", refuses={"sleep"})
        engines = (second, lone, first)
        for engine in engines:
            assert await engine.pool.sleeper.standby()
        first.pool.last_active -= 100
        lone.pool.last_active -= 200
        pools = [engine.pool for engine in engines]
        assert [pool.name for pool in longest_in_standby(pools)] == ["lone", "first", "second"]
        short = ["memory is short"]
        task = asyncio.get_running_loop().create_task(relieve(lambda: pools, lambda: short[0], every_s=0.02))
        await until(lambda: first.tracker.phase is Phase.ASLEEP)
        assert second.tracker.phase is Phase.STANDBY, "one at a time"
        await until(lambda: second.tracker.phase is Phase.ASLEEP)
        assert lone.tracker.phase is Phase.STANDBY
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("stalled", "available", "found"),
    [("0.00", 500, ""), ("35.50", 500, "36 %"), ("0.00", 10, "10 of 1000 MiB"), (None, 500, ""), (None, None, "")],
)
def test_memory_is_short_by_pressure_or_by_what_is_available(tmp_path, stalled, available, found):
    if stalled:
        (tmp_path / "pressure").write_text(f"some avg10={stalled} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00\n")
    room = available and memory.Room(available << 20, 1000 << 20)
    why = shortage([tmp_path / "missing", tmp_path / "pressure"], lambda: room)
    assert (found in why) if found else why == ""


def test_available_is_what_this_containers_limit_leaves_or_unknown_where_the_host_does_not_say(tmp_path, monkeypatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "self" / "mountinfo").write_text(f"31 23 0:28 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    limits = {"memory.max": 4 << 30, "memory.current": 3 << 30, "memory.stat": f"inactive_file {1 << 20}"}
    for name, text in limits.items():
        (tmp_path / name).write_text(str(text))
    monkeypatch.setattr(memory.room, "__defaults__", (tmp_path,))
    assert memory_room() is None
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n")
    assert memory_room() == memory.Room((1 << 30) + (1 << 20), 4 << 30)


async def noop():
    pass


def admitting(engines, needs=None, **limits):
    """Admission of these engines; `needs`: the GPU memory of each."""
    found = Admission(**{"limit": 0, "order": "lru", "min_awake_s": 0.0, "drain_s": 1.0} | limits)
    for name, engine in engines.items():
        endpoint = SimpleNamespace(name=name, pool=engine.pool, tracker=engine.tracker)
        found.add(Member(endpoint, gpu_memory=(needs or {}).get(name, 0)))
    return found


def test_a_restore_that_needs_the_memory_of_others_puts_them_to_sleep(monkeypatch):
    async def check():
        engines = {name: Engine(name) for name in ("wanted", "old", "new")}
        for engine in engines.values():
            assert await engine.pool.sleeper.standby()
        engines["old"].pool.last_active -= 100
        free = iter([10, 30])
        monkeypatch.setattr(admission, "memory_room", lambda: memory.Room(next(free), 100))
        limit = admitting(engines)
        wanted = limit.guard("wanted", noop)
        await wanted()
        assert engines["old"].tracker.phase is Phase.STANDBY, "it is in standby itself and needs no more than it has"
        engines["wanted"].pool.facts = lambda: Facts(snapshot_bytes=20)
        engines["wanted"].tracker.to(Phase.ASLEEP)
        await wanted()
        phases = {name: str(engine.tracker.phase) for name, engine in engines.items()}
        assert phases == {"wanted": "asleep", "old": "asleep", "new": "standby"}
        monkeypatch.setattr(admission, "memory_room", lambda: None)
        await wanted()
        assert engines["new"].tracker.phase is Phase.STANDBY, "a host that does not say is not short"

    asyncio.run(check())


def test_models_awake_take_no_more_gpu_memory_than_there_is():
    async def check():
        needs = {"wanted": 50, "small": 20, "large": 60, "cpu": 0}
        engines = {name: Engine(name) for name in needs}
        for age, name in enumerate(("cpu", "small", "large")):  # the first was idle for longest
            engines[name].pool.last_active -= 100 - age
            engines[name].pool.sleeper.evicts_to_standby = True
        engines["wanted"].tracker.to(Phase.ASLEEP)
        limit = admitting(engines, needs, gpu_memory=100)
        await limit.guard("wanted", noop)()
        phases = {name: str(engine.tracker.phase) for name, engine in engines.items()}
        assert phases == {"wanted": "asleep", "small": "standby", "large": "standby", "cpu": "serving"}
        engines["wanted"].tracker.to(Phase.MOUNTING)  # it wakes
        await limit.guard("small", noop)()
        waiting = asyncio.ensure_future(limit.guard("large", noop)())
        await asyncio.sleep(0.1)
        assert not waiting.done(), "what starts is waited for"
        engines["wanted"].tracker.to(Phase.FAILED)
        await waiting

    asyncio.run(check())


def test_a_model_that_keeps_its_gpu_memory_is_named_to_who_needs_it():
    async def check():
        engines = {"wanted": Engine("wanted"), "stays": Engine("stays", refuses={"sleep", "standby"})}
        engines["wanted"].tracker.to(Phase.ASLEEP)
        limit = admitting(engines, {"wanted": 50, "stays": 60}, gpu_memory=100)
        with pytest.raises(ProxyError, match="GPU memory together, and stays did not go to sleep") as refused:
            await limit.guard("wanted", noop)()
        assert refused.value.code == "no-room"

    asyncio.run(check())


def test_what_moves_from_a_gpu_into_host_memory_needs_room_there(monkeypatch):
    async def check():
        engines = {name: Engine(name) for name in ("moves", "rests")}
        assert await engines["rests"].pool.sleeper.standby()
        rooms = iter([memory.Room(20, 100), memory.Room(80, 100)])
        monkeypatch.setattr(admission, "memory_room", lambda: next(rooms))
        admitting(engines, {"moves": 60})
        engines["moves"].pool.facts = lambda: Facts(snapshot_bytes=70, gpu_memory=60)
        engines["moves"].replica.memory_bytes = 10
        assert await engines["moves"].pool.sleeper.standby()
        assert engines["rests"].tracker.phase is Phase.ASLEEP

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "found"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 << 30), ("1.5kb", 1500), ("0", 0), ("0.0", 0), ("512mib", 512 << 20)],
)
def test_a_size_has_a_unit(text, found):
    assert Bytes.read(text) == found


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "80 ib", "1e3GB", "80GB 1", "nan", ""])
def test_a_size_without_a_unit_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        Bytes.read(text)
