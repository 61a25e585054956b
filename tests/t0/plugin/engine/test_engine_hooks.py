"""The hooks in an engine, without the engine: a canary waits for its request, packed weights are found, results are passed on."""

import ctypes
import queue
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from launchers.base import Engine
from launchers.canary import JOINED, canary_id
from launchers.errors import EngineFailed
from launchers.vllm import Vllm
from plugin.engine import control, joining, packed_weights, sglang_hooks, vllm_hooks

pytestmark = pytest.mark.t0


@pytest.fixture
def woken(monkeypatch):
    """Set the state of a process that was woken and has not yet waited for a request."""
    monkeypatch.setattr(joining, "allowed", True)


def test_hooks_and_launchers_use_the_same_name_for_a_joined_canary(woken):
    assert joining.JOINED == JOINED
    assert joining.wanted([f"cmpl-{canary_id(True)}-0"]) and not joining.wanted([canary_id(False)])
    assert not joining.wanted([]) and not joining.wanted([canary_id(True), "another"])


def engine_core(identifiers):
    core = SimpleNamespace(scheduler=SimpleNamespace(waiting=[]), input_queue=queue.Queue())
    for identifier in identifiers:
        core.input_queue.put(identifier)
    return core


def drain(core):
    while not core.input_queue.empty():
        core.scheduler.waiting.append(SimpleNamespace(request_id=core.input_queue.get()))


def test_vllm_waits_for_the_request_beside_the_canary(woken):
    core = engine_core([canary_id(True)])
    late = threading.Timer(0.002, core.input_queue.put, ["the user's"])
    late.start()
    vllm_hooks._join(drain)(core)
    late.join()
    assert len(core.scheduler.waiting) == 2


@pytest.mark.parametrize("identifiers", [[canary_id(False)], [canary_id(True), "the user's"], ["the user's"], []])
def test_vllm_does_not_wait_without_a_joined_canary(woken, monkeypatch, identifiers):
    monkeypatch.setattr(joining, "wait", lambda arrived: pytest.fail("it waited"))
    core = engine_core(identifiers)
    vllm_hooks._join(drain)(core)
    assert len(core.scheduler.waiting) == len(identifiers)


def test_the_wait_for_a_joined_request_is_short(woken):
    core, began = engine_core([canary_id(True)]), time.monotonic()
    vllm_hooks._join(drain)(core)
    assert len(core.scheduler.waiting) == 1 and time.monotonic() - began >= joining.LIMIT_S


def clients(begin):
    """Return for how many of ten clients, which name their request as a joined canary, the engine waits."""
    waited = 0
    for _ in range(10):
        before = time.monotonic()
        begin(f"{JOINED}mine")
        waited += time.monotonic() - before >= joining.LIMIT_S
    return waited


def vllm_begins(identifier):
    vllm_hooks._join(drain)(engine_core([identifier]))


def sglang_begins(identifier):
    scheduler = SimpleNamespace(tp_size=1, ingest_requests=list)
    sglang_hooks._after_ingest([SimpleNamespace(rid=identifier)], scheduler)


@pytest.mark.parametrize("begin", [vllm_begins, sglang_begins])
def test_a_client_cannot_make_an_engine_wait_by_its_requests_name(monkeypatch, begin):
    assert clients(begin) == 0, "it was never woken"
    monkeypatch.setattr(joining, "allowed", True)
    assert clients(begin) == 1, "one wait for each wake"


def test_a_wake_allows_the_wait():
    woken = "from plugin.engine import control, joining; control._on_wake(0, None); print(joining.allowed)"
    assert subprocess.run([sys.executable, "-c", woken], capture_output=True, text=True, check=True).stdout == "True\n"


def test_vllm_loads_artefacts_that_inductor_compiled_itself():
    def plain():
        return 7

    own = SimpleNamespace(finalize_loading="vLLM's own")
    for compiled in (plain, own):
        found = vllm_hooks._finalizable(
            lambda file, compiled=compiled: SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=compiled))
        )(0)
        assert found._artifacts.compiled_fn is compiled
    assert plain.finalize_loading(None) is None and plain() == 7
    assert own.finalize_loading == "vLLM's own"
    assert vllm_hooks._finalizable(lambda file: "of another PyTorch")(0) == "of another PyTorch"


def test_a_cpu_artefacts_hash_has_its_processor_and_threads(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 2))
    named = vllm_hooks._with_processor(lambda config: ["vLLM's own"])
    on_cpu, on_gpu = (SimpleNamespace(device_config=SimpleNamespace(device_type=kind)) for kind in ("cpu", "cuda"))
    here = named(on_cpu)
    assert here[0] == "vLLM's own" and here == named(on_cpu) and here.own == ["vLLM's own"]
    assert named(on_gpu) == named(on_gpu).own == ["vLLM's own"]
    monkeypatch.setattr(vllm_hooks, "_processor_flags", lambda: "sse2 amx_tile")
    assert named(on_cpu) not in (here, ["vLLM's own"])
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 64))
    assert named(on_cpu)[-2:] == ["sse2 amx_tile", 64]


@pytest.mark.parametrize(("ranks", "taken"), [(1, 2), (2, 1)])
def test_sglang_joins_both_requests_with_a_single_scheduler(woken, ranks, taken):
    others = [[], [], [SimpleNamespace(rid="the user's")]]
    scheduler = SimpleNamespace(tp_size=ranks, ingest_requests=lambda: others.pop(0))
    assert len(sglang_hooks._after_ingest([SimpleNamespace(rid=canary_id(True))], scheduler)) == taken


def test_on_a_cpu_the_first_result_after_a_wake_is_sent_at_once(monkeypatch):
    cpu, gpu, batch = SimpleNamespace(device="cpu"), SimpleNamespace(device="cuda"), object()
    choice = sglang_hooks._after_overlap_choice
    monkeypatch.setattr(control, "fresh", False)
    assert choice(False, cpu, batch, last_batch=batch) is False
    for scheduler, expected in ((cpu, True), (gpu, False)):
        monkeypatch.setattr(control, "fresh", True)
        assert choice(False, scheduler, batch, last_batch=None) is False  # no result yet
        assert choice(False, scheduler, None, last_batch=batch) is False  # no step is running
        assert choice(False, scheduler, batch, last_batch=batch) is expected
        assert choice(False, scheduler, batch, last_batch=batch) is False  # once


def test_packed_weights_are_found_through_pointers_by_their_size():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    size = 3 << 20
    wanted, smaller, step, handle = libc.malloc(size), libc.malloc(size // 2), libc.malloc(200), libc.malloc(168)
    try:
        for at, words in ((step, (0x1234, wanted, smaller)), (handle, (smaller, 0xFFFF_FFFF_FFF0, step))):
            ctypes.memset(at, 0, 160)
            ctypes.memmove(at, struct.pack("<3Q", *words), 24)
        assert packed_weights.find(handle, size) == wanted
        assert packed_weights.find(handle, size // 2) == smaller
        assert packed_weights.find(handle, size * 2) is None
        layer = SimpleNamespace(weight=SimpleNamespace(element_size=lambda: 2))
        held = SimpleNamespace(handler_tensor=SimpleNamespace(item=lambda: handle), n=1024, k=size // 2048)
        layer.cpu_linear = lambda x: held
        model = SimpleNamespace(modules=lambda: [layer, SimpleNamespace(), SimpleNamespace(cpu_linear=print)])
        assert packed_weights.weights(model) == ([(wanted, size)], [])
    finally:
        for at in (wanted, smaller, step, handle):
            libc.free(at)


def test_without_log_probabilities_the_canary_is_a_plain_generation():
    def refuse(client, prompt, tokens, joined=False):
        raise EngineFailed("engine-refused", "no log probabilities here")

    asked = []
    engine = SimpleNamespace(
        greedy_tokens=refuse, generate=lambda client, prompt, tokens: asked.append(tokens) or [1] * tokens
    )
    canary = Engine.record(engine, None, False)
    assert canary.generated == 0 and canary.token_ids == [1, 1] and Engine.answer(engine, None, canary) == [1, 1]
    assert asked == [2, 2]


def test_a_gpus_canary_also_decodes():
    asked = []
    engine = SimpleNamespace(
        greedy_tokens=lambda client, prompt, tokens, joined=False: asked.append((tokens, joined)) or [5, 6, 7]
    )
    assert Engine.record(engine, None, True).generated == 8
    canary = Engine.record(engine, None, False)
    assert canary.generated == 1 and Engine.answer(engine, None, canary, joined=True) == [5, 6, 7]
    assert asked == [(8, False), (1, False), (1, True)]


def test_only_sglangs_first_canary_names_the_weights(monkeypatch):
    written = []
    monkeypatch.setattr(control, "answer", lambda name, text: written.append(name))
    monkeypatch.setattr(sglang_hooks, "_named", False)
    model = SimpleNamespace(parameters=list)
    scheduler = SimpleNamespace(tp_size=1, tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model)))
    for identifier, count in (("the user's", 0), (canary_id(False), 1), (canary_id(False), 1)):
        sglang_hooks._after_ingest([SimpleNamespace(rid=identifier)], scheduler)
        assert written == ["areas"] * count


@pytest.mark.parametrize("old", [False, True])
def test_vllm_drops_its_cache_without_a_search_for_weights_unless_its_hooks_are_older(monkeypatch, old):
    vllm, calls = Vllm(), []

    def control(client, timeout_s, **asked):
        calls.append(asked.get("method") or asked["call"])
        if old and calls[-1] == "quickthaw_drop_cache":
            raise EngineFailed("engine-refused", "no control call")

    monkeypatch.setattr(vllm, "_control", control)
    vllm.drop_cache(None)
    assert calls == ["reset_prefix_cache", "quickthaw_drop_cache", *["quickthaw_trim"] * old]


def test_vllms_hook_drops_the_pages_of_the_cache_only(monkeypatch):
    dropped = []
    monkeypatch.setattr(vllm_hooks.memory, "discard", lambda tensors: dropped.extend(tensors) or 7)
    monkeypatch.setattr(vllm_hooks, "_name_weights", lambda worker: pytest.fail("it searches for weights"))
    worker = SimpleNamespace(model_runner=SimpleNamespace(kv_caches=[["a", None], "b"]))
    assert vllm_hooks._drop_cache(worker) == 7 and dropped == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "hooked"),
    [
        ("def ingest_requests(self): ...\ndef is_disable_overlap_for_batch(self): ...\n", {"ingest_requests", "is_disable_overlap_for_batch"}),
        ("def is_disable_overlap_for_batch(self): ...\n", {"is_disable_overlap_for_batch"}),
        (None, {"ingest_requests", "is_disable_overlap_for_batch"}),
    ],
    ids=["today's", "0.5.17", "source not there"],
)  # fmt: skip
def test_a_hook_is_only_registered_on_what_this_sglang_has(monkeypatch, tmp_path, source, hooked):
    """A hook on a method that is not there is a traceback in each of SGLang's processes."""
    found = set()
    registry = SimpleNamespace(
        HookRegistry=SimpleNamespace(register=lambda target, *_: found.add(target.rpartition(".")[2])),
        HookType=SimpleNamespace(AFTER="after", AROUND="around"),
    )
    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    for name in ("sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"):
        monkeypatch.setitem(sys.modules, name, registry)
    monkeypatch.setattr(control, "install", lambda: None)
    if source is not None:
        file = tmp_path / "srt" / "managers" / "scheduler.py"
        file.parent.mkdir(parents=True)
        file.write_text(source)
    sglang_hooks.register()
    assert found == {"flush_cache", *hooked}
