"""Record where the bytes of a model's weights come from, and fill them again from the launcher's ring.

Before a dump that excludes the weights, `record` describes every storage that will be lost as a stream of segments: bytes of
model files, found by their content and compared byte by byte, zeros, or bytes of its own (a "side" file in the snapshot). Fused
layers, ties and experts need no rule of their own: their storages are runs of whole tensors of the files. After a restore the
launcher (plugin/runtime/weight_ring) reads that stream into a ring of shared memory while CRIU and the driver work, and `refill`
copies it into the same storages. Whatever does not fit is a `NotRefilled`: the caller then uses the engine's own reload.
"""

import array
import bisect
import concurrent.futures
import contextlib
import ctypes
import glob
import hashlib
import itertools
import json
import mmap
import os
import socket
import sys
import time

from . import control

SOCKET = "weights.sock"
LAYOUT, SIDE, REFILLED = "layout", "side", "refilled"
OWN, ZEROS = -1, -2
"""In place of a file's number in a segment: the side file, and zeros."""
HEAD = 64
"""Bytes by which a tensor of a file is looked up; shorter ones are carried in the side file."""
LIMIT_S = 30.0
"""Maximum seconds to record a layout: requests wait meanwhile."""
STALL_S = 30.0
"""Maximum seconds without a message of the ring, before the engine reads its weights itself; the launcher gives up before."""
_SIDE_BYTES, _SIDE_SHARE = 256 << 20, 0.05
_CHUNK = 16 << 20
_THREADS = 4
_TRIES = 64

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_recorded = None
"""Of the last layout: (its digest, [(address, bytes) of each storage])."""


_CLOSED = "weights-ring: the launcher closed the ring"


class NotRefilled(Exception):
    """No layout could be recorded, or a refill failed: `code: reason` in one line."""


class _HostStorage:
    """The bytes of a storage in host memory."""

    def __init__(self, storage):
        self.address, self.size = storage.data_ptr(), storage.nbytes()

    def read(self, at, size):
        """Return `size` bytes from offset `at`."""
        return ctypes.string_at(self.address + at, size)

    def equals(self, at, buffer, size):
        """Return whether the bytes are those at the start of a bytearray."""
        return not _libc.memcmp(self.address + at, _address(buffer), size)

    def write(self, at, ring, offset, size):
        """Copy from offset `offset` of the ring."""
        _libc.memmove(self.address + at, ring.address + offset, size)


class _DeviceStorage:
    """The bytes of a storage on a device, through a tensor of bytes over all of it."""

    def __init__(self, storage):
        import torch

        self.address, self.size = storage.data_ptr(), storage.nbytes()
        self.bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def read(self, at, size):
        """Return `size` bytes from offset `at`."""
        return bytes(self.bytes[at : at + size].cpu().numpy())

    def equals(self, at, buffer, size):
        """Return whether the bytes are those at the start of a bytearray."""
        here = self.bytes[at : at + size].cpu()
        return not _libc.memcmp(here.data_ptr(), _address(buffer), size)

    def write(self, at, ring, offset, size):
        """Copy from offset `offset` of the ring, on the current stream."""
        self.bytes[at : at + size].copy_(ring.bytes[offset : offset + size], non_blocking=True)


def _address(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def lost(models):
    """Return the storages that the engine loses with its weights, each once, in a fixed order.

    On a CPU those of the parameters (memory.drop_weights). On a GPU also those of other tensors that modules hold, such as
    what was computed from parameters, if they lie in memory that vLLM's sleep mode drops. vLLM saves all buffers, SGLang those
    of the first model. Raises NotRefilled (weights-computed) where no allocator says which of the other tensors are lost.
    """
    found: dict[int, _HostStorage | _DeviceStorage] = {}
    dropped = _dropped_ranges()
    for model in models:
        parameters = list(model.parameters())
        for tensor in parameters:
            if not (tensor.device.type == "cpu" and tensor.is_shared()):
                _add(found, tensor, dropped)
        if any(tensor.device.type != "cpu" for tensor in parameters):
            kept = {_start(tensor) for tensor in itertools.chain(parameters, model.buffers())}
            if dropped is None and model is not models[0]:
                for tensor in model.buffers():
                    _add(found, tensor, dropped)
            for tensor in _held(model):
                if _start(tensor) in kept:
                    continue
                if dropped is None:
                    raise NotRefilled("weights-computed: a module holds a tensor that is neither parameter nor buffer")
                _add(found, tensor, dropped)
    return list(found.values())


def _start(tensor):
    return tensor.untyped_storage().data_ptr()


def _add(found, tensor, dropped):
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    if not size or start in found:
        return
    if tensor.device.type == "cpu":
        found[start] = _HostStorage(storage)
    elif dropped is None or _inside(dropped, start, size):
        found[start] = _DeviceStorage(storage)


def _dropped_ranges():
    """Return what vLLM's allocator holds under the tag `weights`, as ascending (start, end); None without that allocator."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    if allocator is None:
        return None
    held = allocator.pointer_to_data.items()
    return sorted((start, start + data.handle[1]) for start, data in held if data.tag == "weights")


def _inside(ranges, start, size):
    at = bisect.bisect_right(ranges, (start, float("inf"))) - 1
    return at >= 0 and start + size <= ranges[at][1]


def _held(model):
    """Yield the tensors on a device that are attributes of a model's modules, or in lists, tuples or dicts among these."""
    import torch

    for module in model.modules():
        stack = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules", "kv_cache")]
        while stack:
            value = stack.pop()
            if isinstance(value, torch.Tensor):
                if value.device.type not in ("cpu", "meta"):
                    yield value
            elif type(value) in (list, tuple):
                stack.extend(value)
            elif type(value) is dict:
                stack.extend(value.values())


class _Sources:
    """The tensors of safetensors files, by their first HEAD bytes."""

    def __init__(self, folders):
        self.by_head: dict[bytes, list[tuple[int, int, int]]] = {}
        self.files, self._fds = [], []
        try:
            for folder in folders:
                names = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
                for path in [folder] if os.path.isfile(folder) else names:
                    self._add(path)
        except BaseException:
            self.close()  # else the dump that follows keeps these files as the engine's own
            raise
        for sources in self.by_head.values():
            sources.sort(key=lambda source: -source[2])

    def _add(self, path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        number, size = len(self.files), os.fstat(fd).st_size
        self._fds.append(fd)
        self.files.append([os.path.abspath(path), size])
        try:
            length = int.from_bytes(os.pread(fd, 8, 0), "little")
            header = json.loads(os.pread(fd, min(length, size), 8))
            tensors = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # of another format: its bytes are found nowhere
        for start, end in tensors:
            if end - start >= HEAD:
                at = 8 + length + start
                self.by_head.setdefault(os.pread(fd, HEAD, at), []).append((number, at, end - start))

    def find(self, storage, at, buffer, limit):
        """Return the longest tensor whose bytes the storage holds from offset `at`, as (file, offset, bytes), or None."""
        candidates = self.by_head.get(storage.read(at, HEAD), ()) if storage.size - at >= HEAD else ()
        for file, offset, size in itertools.islice((one for one in candidates if one[2] <= storage.size - at), _TRIES):
            if self._same(storage, at, self._fds[file], offset, size, buffer, limit):
                return file, offset, size
        return None

    @staticmethod
    def _same(storage, at, fd, offset, size, buffer, limit):
        for done in range(0, size, len(buffer)):
            part = min(len(buffer), size - done)
            if time.monotonic() > limit:
                raise NotRefilled(f"weights-slow: comparing the weights with their files took over {LIMIT_S:.0f} s")
            with memoryview(buffer) as view, view[:part] as into:
                if os.preadv(fd, [into], offset + done) != part:
                    return False
            if not storage.equals(at + done, buffer, part):
                return False
        return True

    def close(self):
        """Close the files."""
        for fd in self._fds:
            os.close(fd)


def record(models, folders):
    """Write the layout of the weights of `models`, loaded from `folders`, for the launcher. Never raises: a refusal is the answer.

    The answers are `<pid>.layout` and, if there are bytes of its own, `<pid>.side`.
    """
    global _recorded
    _recorded = None
    try:
        layout, own, recorded = _layout(models, folders)
        if own:
            control.answer(SIDE, own)
        text = json.dumps(layout)
        control.answer(LAYOUT, text)
        _recorded = (digest(text), recorded)
    except NotRefilled as error:
        control.answer(LAYOUT, json.dumps({"declined": str(error)}))
    except Exception as error:  # noqa: BLE001 - other versions' models may hold anything; without a layout a restore is only slower
        control.answer(LAYOUT, json.dumps({"declined": f"weights-unknown: {error!r}"}))


def digest(text):
    """Return the name by which ring and engine know that they mean the same layout."""
    return hashlib.sha256(text.encode()).hexdigest()


def _layout(models, folders):
    """Return the layout, the bytes of its own, and (address, bytes) of each storage."""
    storages = lost(models)
    total = sum(storage.size for storage in storages)
    if not total:
        raise NotRefilled("weights-none: no weights are lost")
    sources, limit = _Sources(folders), time.monotonic() + LIMIT_S
    try:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            found = list(threads.map(lambda storage: _segments(storage, sources, limit), storages))
    finally:
        sources.close()
    segments: list[list[int]] = []
    own = bytearray()
    for storage, parts in zip(storages, found, strict=True):
        for file, offset, size in parts:
            if file == OWN:
                own_at, offset = offset, len(own)
                if offset + size > max(_SIDE_BYTES, total * _SIDE_SHARE):
                    raise NotRefilled(
                        f"weights-not-in-files: of {total >> 20} MiB more than {len(own) >> 20} MiB are not in the model's files"
                        " as the engine holds them (another data type, or quantized)"
                    )
                own += storage.read(own_at, size)
            last = segments[-1] if segments else None
            if last and last[0] == file and (file == ZEROS or last[1] + last[2] == offset):
                last[2] += size
            else:
                segments.append([file, offset, size])
    layout = {"files": sources.files, "segments": segments, "own": len(own), "total": total}
    return layout, bytes(own), [(storage.address, storage.size) for storage in storages]


def _segments(storage, sources, limit):
    """Return the segments of one storage. For OWN the offset is the storage's own."""
    parts, at, buffer = [], 0, bytearray(min(_CHUNK, max(storage.size, HEAD)))
    while at < storage.size:
        found = sources.find(storage, at, buffer, limit)
        if found is None:
            break
        parts.append(found)
        at += found[2]
    zeros = bytearray(1 << 20)
    while at < storage.size:  # padding, and what was computed
        size = min(len(zeros), storage.size - at)
        parts.append((ZEROS, 0, size) if storage.equals(at, zeros, size) else (OWN, at, size))
        at += size
    return parts


class _Ring:
    """The launcher's shared memory in this process; on a GPU, the driver knows its pages."""

    def __init__(self, fd, slots, slot_bytes, device):
        self.memory = mmap.mmap(fd, slots * slot_bytes)
        self.slots, self.slot_bytes, self.device = slots, slot_bytes, device
        self.bytes = self._stream = None
        self._pinned, self._writes = set(), []
        self._pins = device is not None and device.type == "cuda"
        self.address = _address(self.memory)
        if device is not None:
            import torch

            self.bytes, self._torch = torch.frombuffer(self.memory, dtype=torch.uint8), torch
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pin(self, slot):
        """Register a slot with the driver before its first copy; without that, copies are slower and otherwise the same."""
        if self._pins and slot not in self._pinned:
            address = self.address + slot * self.slot_bytes
            if not int(self._torch.cuda.cudart().cudaHostRegister(address, self.slot_bytes, 0)):
                self._pinned.add(slot)
                return
            self._pins = False
            with contextlib.suppress(RuntimeError):  # a kernel's launch reports the driver's last error, and clears it
                self._torch.zeros(1, device=self.device)

    def copying(self):
        """Return a context for the copies of one slot."""
        if self._stream is None:
            return contextlib.nullcontext()
        return self._torch.cuda.stream(self._stream)

    def written(self, number):
        """Note that the copies of slot number `number` of the stream were issued; yield the numbers whose copies have ended."""
        event = None
        if self._stream is not None:
            event = self._torch.cuda.Event()
            event.record(self._stream)
        self._writes.append((number, event))
        while self._writes and (
            self._writes[0][1] is None or self._writes[0][1].query() or len(self._writes) > self.slots // 2
        ):
            first, waited = self._writes.pop(0)
            if waited is not None:
                waited.synchronize()
            yield first

    def close(self):
        """Wait for all copies, and unregister and unmap the memory."""
        if self._stream is not None:
            self._stream.synchronize()
            for slot in self._pinned:
                self._torch.cuda.cudart().cudaHostUnregister(self.address + slot * self.slot_bytes)
        self.bytes = None
        with contextlib.suppress(BufferError):  # after a failed copy a traceback holds it a moment longer
            self.memory.close()


def offered():
    """Return whether the launcher offers a ring."""
    folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
    return folder is not None and os.path.exists(os.path.join(folder, SOCKET))


def refill(models):
    """Fill the weights of `models` from the ring, and answer the launcher as `<pid>.refilled`. Return whether all of them came.

    After False the storages hold anything, and the engine must load its weights itself.
    """
    began = time.monotonic()
    failed = ""
    size = waited = 0.0
    try:
        size, waited = _refill(models)
    except NotRefilled as error:
        failed = str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine's own reload follows
        failed = f"weights-ring: {error!r}"
    took = round(time.monotonic() - began, 4)
    control.answer(REFILLED, json.dumps({"failed": failed, "bytes": size, "seconds": took, "waited": round(waited, 4)}))
    return not failed


def _refill(models):
    """Return the bytes filled and the seconds spent waiting for the ring."""
    if _recorded is None:
        raise NotRefilled("weights-not-recorded: this engine recorded no layout")
    named, recorded = _recorded
    storages = lost(models)
    if [(storage.address, storage.size) for storage in storages] != recorded:
        raise NotRefilled("weights-moved: the engine holds its weights elsewhere than at its snapshot")
    device = next((storage.bytes.device for storage in storages if isinstance(storage, _DeviceStorage)), None)
    path = os.path.join(os.environ["QUICKTHAW_CONTROL_DIR"], SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(STALL_S)
        peer.connect(path)
        head, fd = _receive_head(peer)
        try:
            if head["layout"] != named:
                raise NotRefilled("weights-differ: the ring has the weights of another layout")
            ring = _Ring(fd, head["slots"], head["slot_bytes"], device)
        finally:
            os.close(fd)
        try:
            return _copy(peer, ring, storages)
        finally:
            ring.close()


def _receive_head(peer):
    data, fds, _, _ = socket.recv_fds(peer, 1 << 16, 1)
    if not data or not fds:
        raise NotRefilled(_CLOSED)
    return json.loads(data), fds[0]


def _copy(peer, ring, storages):
    """Copy the stream slot by slot into the storages."""
    waited, done, total = 0.0, 0, sum(storage.size for storage in storages)
    index = at = number = 0
    while done < total:
        began = time.monotonic()
        data = peer.recv(1 << 16)
        waited += time.monotonic() - began
        if not data:
            raise NotRefilled(_CLOSED)
        message = json.loads(data)
        if "error" in message:
            raise NotRefilled(message["error"])
        slot, left = number % ring.slots, message["bytes"]
        if message["number"] != number or not 0 < left <= min(ring.slot_bytes, total - done):
            raise NotRefilled(f"weights-ring: slot {message} came where number {number} was expected")
        offset = slot * ring.slot_bytes
        ring.pin(slot)
        with ring.copying():
            while left:
                size = min(left, storages[index].size - at)
                storages[index].write(at, ring, offset, size)
                at, offset, left, done = at + size, offset + size, left - size, done + size
                if at == storages[index].size:
                    index, at = index + 1, 0
        freed = array.array("q", ring.written(number))
        if freed:
            peer.send(freed.tobytes())
        number += 1
    return total, waited
