"""A layout is found by content and compared byte by byte; the ring's bytes come back into the same storages, or not at all.

The tensors are doubles with memory of their own; with torch's, and a real engine: tests/t2/test_weight_ring.py.
"""

import ctypes
import json
import os
import random
import shutil
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from plugin.engine import weights
from plugin.runtime.phases import PhaseTracker
from plugin.runtime.weight_ring import feed, layout

pytestmark = pytest.mark.t0
draw = random.Random(5)


class Tensor:
    device = SimpleNamespace(type="cpu")

    def __init__(self, data):
        self.memory = (ctypes.c_char * len(data)).from_buffer_copy(data)

    def is_shared(self):
        return False

    def untyped_storage(self):
        return self

    def data_ptr(self):
        return ctypes.addressof(self.memory)

    def nbytes(self):
        return len(self.memory)


class Model:
    def __init__(self, *tensors):
        self.tensors = tensors

    def parameters(self):
        return iter(self.tensors)


def safetensors(path, tensors):
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


Q, K, V, GATE, UP = (draw.randbytes(size) for size in (5000, 700, 700, 3000, 3000))
NORM = struct.pack("<H", 0x3F80) * 64  # ones in bfloat16, as every norm of a fresh model is
ROTARY = draw.randbytes(333)


@pytest.fixture
def control_dir(tmp_path, monkeypatch):
    folder = tmp_path / "control"
    folder.mkdir()
    monkeypatch.setenv("QUICKTHAW_CONTROL_DIR", str(folder))
    return folder


@pytest.fixture
def checkpoint_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors(folder / "a.safetensors", {"q": Q, "k": K, "norm.0": NORM, "norm.1": NORM, "up": UP})
    safetensors(folder / "b.safetensors", {"v": V, "gate": GATE})
    return folder


def model():
    """A model as engines hold it: fused layers, a tie, padding, and a tensor that is in no file."""
    tied = Tensor(UP + bytes(2500))
    return Model(Tensor(Q + K + V), Tensor(NORM), Tensor(GATE + UP), tied, tied, Tensor(NORM), Tensor(ROTARY))


def contents(held):
    return [bytes(tensor.memory) for tensor in held.tensors]


def recorded(control_dir, tmp_path, held, *folders):
    """Record a layout and keep it as a snapshot does; return that snapshot's folder and the layout."""
    weights.record([held], [str(folder) for folder in folders])
    found = layout.collect(control_dir)
    assert not isinstance(found, str), found
    folder = tmp_path / "snapshot"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "weights").mkdir(parents=True)
    for name, file in found.items():
        shutil.copyfile(file, folder / name)
    layout.forget(control_dir)
    return folder, json.loads((folder / "weights" / "layout.json").read_text())


def lose(held):
    for tensor in held.tensors:
        ctypes.memset(tensor.data_ptr(), 0xEE, tensor.nbytes())


def test_fused_tied_padded_and_computed_weights_come_back(control_dir, checkpoint_dir, tmp_path):
    held = model()
    before = contents(held)
    folder, found = recorded(control_dir, tmp_path, held, checkpoint_dir)
    assert found["own"] == len(ROTARY), "all else is in the files or zero"
    assert found["total"] == sum(map(len, before)) - len(UP) - 2500, "a tie is carried once"
    for _ in range(2):
        lose(held)
        with feed.WeightFeed(PhaseTracker()) as ring:
            assert ring.begin(folder, "", None)
            ring.offer(control_dir)
            assert weights.offered() and weights.refill([held])
            assert ring.settle()
        assert contents(held) == before and not weights.offered()


def test_no_memory_and_no_descriptor_stays(control_dir, checkpoint_dir, tmp_path):
    held = model()
    folder, _ = recorded(control_dir, tmp_path, held, checkpoint_dir)
    before = None
    for _ in range(20):
        with feed.WeightFeed(PhaseTracker()) as ring:
            ring.begin(folder, "", None)
            ring.offer(control_dir)
            assert weights.refill([held])
            threads = ring.ring._threads
        for thread in threads:
            thread.join(5.0)
        assert "quickthaw-weights" not in Path("/proc/self/maps").read_text()
        before = before or len(os.listdir("/proc/self/fd"))
    limit = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < limit
    assert sorted(file.name for file in control_dir.iterdir() if file.suffix != ".refilled") == []


def test_an_engine_that_connects_at_once_finds_its_layout(control_dir, checkpoint_dir, tmp_path):
    held, ring = model(), feed.WeightFeed(PhaseTracker())
    folder, _ = recorded(control_dir, tmp_path, held, checkpoint_dir)
    refilled = []

    class Begun(threading.Event):
        def set(self):
            super().set()
            ring.offer(control_dir)
            refilled.append(weights.refill([held]))

    ring._begun = Begun()
    with ring:
        assert ring.begin(folder, "", None)
    assert refilled == [True]


def test_an_engine_that_connects_while_the_ring_closes_gets_nothing(control_dir, checkpoint_dir, tmp_path):
    folder, _ = recorded(control_dir, tmp_path, model(), checkpoint_dir)
    ours, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with feed.WeightFeed(PhaseTracker()) as ring, engine:
        ring.begin(folder, "", None)
        held = ring.ring

        def accept():
            ring.close()
            return ours, None

        thread = threading.Thread(target=ring._serve, args=(SimpleNamespace(accept=accept), held), daemon=True)
        thread.start()
        thread.join(5.0)
        assert not thread.is_alive(), "the engine keeps its end open"
        assert engine.recv(1 << 16) == b""


def test_a_model_that_is_never_mounted_is_one_line(control_dir, checkpoint_dir, tmp_path, monkeypatch, caplog):
    folder, _ = recorded(control_dir, tmp_path, model(), checkpoint_dir)
    monkeypatch.setattr(feed, "STALL_S", 0.05)
    mounted = threading.Event()
    with feed.WeightFeed(PhaseTracker()) as ring:
        ring.begin_later(folder, str(checkpoint_dir), lambda: mounted.wait(5.0) and checkpoint_dir)
        ring.offer(control_dir)
        assert "weights-stalled: no mount" in caplog.text and not weights.offered()
        mounted.set()
        assert ring._begun.wait(5.0) and ring.ring is None, "nobody would take what it reads"


def test_a_mount_that_fails_keeps_no_restore_waiting(control_dir, tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: reported.append(failed.exc_type))
    with feed.WeightFeed(PhaseTracker()) as ring:
        ring.begin_later(tmp_path, "", lambda: {}["a fault of ours"])
        assert ring._begun.wait(5.0)
    assert reported in ([], [KeyError]), "its thread reports it after that"


def test_a_file_that_cannot_be_opened_leaves_no_descriptor_for_the_dump(control_dir, checkpoint_dir):
    (checkpoint_dir / "c.safetensors").symlink_to("gone")
    weights.record([model()], [str(checkpoint_dir)])
    assert "weights-unknown" in layout.collect(control_dir)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [path for path in opened if path.endswith(".safetensors")]


def test_the_model_may_be_elsewhere_on_this_host(control_dir, checkpoint_dir, tmp_path):
    held = model()
    before = contents(held)
    folder, _ = recorded(control_dir, tmp_path, held, checkpoint_dir)
    elsewhere = checkpoint_dir.rename(tmp_path / "elsewhere")
    lose(held)
    tracker = PhaseTracker()
    with feed.WeightFeed(tracker) as ring:
        ring.begin_later(folder, str(checkpoint_dir), lambda: elsewhere)
        ring.offer(control_dir)
        assert weights.refill([held]) and ring.settle()
    assert contents(held) == before
    assert [work.name for work in tracker.work] == ["weights-ahead", "weights"]


def test_draft_models_are_filled_too(control_dir, checkpoint_dir, tmp_path):
    target, draft = model(), Model(Tensor(V + GATE))
    before = contents(target) + contents(draft)
    weights.record([target, draft], [str(checkpoint_dir)])
    folder = tmp_path / "snapshot"
    (folder / "weights").mkdir(parents=True)
    for name, file in layout.collect(control_dir).items():
        shutil.copyfile(file, folder / name)
    lose(target)
    lose(draft)
    with feed.WeightFeed(PhaseTracker()) as ring:
        ring.begin(folder, "", None)
        ring.offer(control_dir)
        assert weights.refill([target, draft])
    assert contents(target) + contents(draft) == before


def test_converted_weights_are_declined_by_name(control_dir, checkpoint_dir, monkeypatch):
    monkeypatch.setattr(weights, "_SIDE_BYTES", 1000)
    weights.record([Model(Tensor(draw.randbytes(6000)))], [str(checkpoint_dir)])
    assert "weights-not-in-files" in layout.collect(control_dir)
    assert not weights.refill([model()]), "nothing was recorded"


def test_a_search_that_takes_too_long_is_declined(control_dir, checkpoint_dir, monkeypatch):
    monkeypatch.setattr(weights, "LIMIT_S", -1.0)
    weights.record([model()], [str(checkpoint_dir)])
    assert "weights-slow" in layout.collect(control_dir)


def test_a_file_that_is_no_safetensors_file_is_found_nowhere(control_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_SIDE_BYTES", 1000)
    (tmp_path / "odd.safetensors").write_bytes(Q + K + V)
    weights.record([model()], [str(tmp_path)])
    assert "weights-not-in-files" in layout.collect(control_dir)


def test_a_tensor_with_the_same_beginning_is_not_taken_for_it(control_dir, tmp_path):
    """The bytes are compared to the last one."""
    folder = tmp_path / "model"
    folder.mkdir()
    other = bytearray(Q)
    other[-1] ^= 1
    safetensors(folder / "a.safetensors", {"a": bytes(other), "b": Q})
    held = Model(Tensor(Q))
    kept, found = recorded(control_dir, tmp_path, held, folder)
    assert len(found["segments"]) == 1 and found["own"] == 0
    lose(held)
    with feed.WeightFeed(PhaseTracker()) as ring:
        ring.begin(kept, "", None)
        ring.offer(control_dir)
        assert weights.refill([held])
    assert contents(held) == [Q]


def failed(control_dir):
    (note,) = control_dir.glob("*.refilled")
    return json.loads(note.read_text())["failed"]


def test_weights_that_the_engine_holds_elsewhere_are_not_filled(control_dir, checkpoint_dir, tmp_path):
    held = model()
    recorded(control_dir, tmp_path, held, checkpoint_dir)
    moved = model()
    lose(moved)
    before = contents(moved)
    assert not weights.refill([moved]) and "weights-moved" in failed(control_dir)
    assert contents(moved) == before


def test_without_a_ring_the_engine_hears_it_at_once(control_dir, checkpoint_dir, tmp_path):
    held = model()
    recorded(control_dir, tmp_path, held, checkpoint_dir)
    assert not weights.offered() and not weights.refill([held])
    assert "weights-ring" in failed(control_dir)


def test_a_damaged_or_missing_layout_and_missing_files_are_one_line(checkpoint_dir, control_dir, tmp_path, caplog):
    folder, _ = recorded(control_dir, tmp_path, model(), checkpoint_dir)
    assert not feed.WeightFeed(PhaseTracker()).begin(tmp_path, "", None) and not caplog.text, "an older snapshot"
    assert not feed.WeightFeed(PhaseTracker()).begin(folder, str(checkpoint_dir), None)
    os.truncate(checkpoint_dir / "a.safetensors", 10)
    assert not feed.WeightFeed(PhaseTracker()).begin(folder, "", None)
    (folder / "weights" / "layout.json").write_text("{")
    assert not feed.WeightFeed(PhaseTracker()).begin(folder, "", None)
    codes = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert codes == ["weights-unreadable", "weights-unreadable", "weights-layout"]


class OnDevice(Tensor):
    device = SimpleNamespace(type="cuda")


class Layer:
    """A module with buffers, what was computed from parameters, a KV cache, and tensors in containers."""

    def __init__(self):
        self._parameters = {"w": OnDevice(Q)}
        self.buffer, self.computed, self.inside = OnDevice(V), OnDevice(K), OnDevice(UP)
        self.kv_cache = [OnDevice(GATE)]
        self.lora = ({"a": [self.inside]},)
        self.view_of_parameter = self._parameters["w"]
        self.on_host = Tensor(NORM)

    def parameters(self):
        return iter(self._parameters.values())

    def buffers(self):
        return iter([self.buffer])

    def modules(self):
        return [self]


@pytest.fixture
def device(monkeypatch):
    """A device without torch; return a function that lets vLLM's allocator hold tensors under a tag."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Tensor))
    monkeypatch.setattr(weights, "_DeviceStorage", weights._HostStorage)

    def allocator(**tags):
        held = {
            tensor.data_ptr(): SimpleNamespace(handle=(0, tensor.nbytes()), tag=tag)
            for tag, tensors in tags.items()
            for tensor in tensors
        }
        module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=SimpleNamespace(pointer_to_data=held)))
        monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)

    return allocator


def test_on_a_gpu_what_vllms_sleep_drops_is_lost_and_nothing_else(device):
    layer = Layer()
    weight, inside = layer._parameters["w"], layer.inside
    device(weights=[weight, layer.buffer, layer.computed, inside], kv_cache=layer.kv_cache)
    lost = [storage.address for storage in weights.lost([layer])]
    assert set(lost) == {weight.data_ptr(), layer.computed.data_ptr(), inside.data_ptr()}, "vLLM saves the buffers"
    assert lost == [storage.address for storage in weights.lost([layer, layer])], "each once, in a fixed order"
    device(weights=[weight], kv_cache=[*layer.kv_cache, layer.computed, inside])
    assert [storage.address for storage in weights.lost([layer])] == [weight.data_ptr()]


def test_computed_tensors_are_declined_where_no_allocator_tells_which_are_lost(device, control_dir, checkpoint_dir):
    weights.record([Layer()], [str(checkpoint_dir)])
    assert "weights-computed" in layout.collect(control_dir)


def test_sglang_saves_the_buffers_of_its_first_model_only(device):
    target, draft = Layer(), Layer()
    for layer in (target, draft):
        layer.computed = layer.inside = None
        layer.lora, layer.kv_cache = (), []
    lost = {storage.address for storage in weights.lost([target, draft])}
    assert draft.buffer.data_ptr() in lost and target.buffer.data_ptr() not in lost
