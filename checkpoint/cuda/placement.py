"""Which GPU a process tree gets: each replica of a launch its own, and after a restore another than at the dump."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint.compatibility.gpu import Gpu, select_visible


def all_pairs(pairs: Sequence[tuple[str, str]], then: Sequence[str], now: Sequence[str]) -> list[tuple[str, str]]:
    """Return `pairs` (uuid then, uuid now), completed by the host's other GPUs; empty if `pairs` is.

    The driver wants every GPU that it knew at the checkpoint in the map, also those that CUDA_VISIBLE_DEVICES hid from
    the engine, and none twice. `then` and `now`: the uuids of all GPUs of the host at the dump, and here. A GPU that is
    left without a partner, because there are fewer here, is not mapped.
    """
    if not pairs:
        return []
    found = dict(pairs)
    free = [uuid for uuid in now if uuid not in found.values()]
    others = [uuid for uuid in then if uuid not in found]
    for uuid in sorted(others, key=lambda uuid: uuid not in free):  # those that are still here keep their place
        if free:
            found[uuid] = uuid if uuid in free else free[0]
            free.remove(found[uuid])
    return list(found.items())


def places(gpus: Sequence[Gpu], visible: str | None, replicas: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each replica: one GPU each, in the order that the engine sees, over again if there are too few.

    `gpus`: all of this host; `visible`: the user's CUDA_VISIBLE_DEVICES, whose words are kept, as engines may not take
    other forms. All None, which changes nothing, for a single replica or less than two GPUs to choose from.
    """
    count = len(select_visible(tuple(gpus), visible))
    if replicas < 2 or count < 2:
        return [None] * replicas
    words = [word.strip() for word in visible.split(",")] if visible is not None else list(map(str, range(count)))
    return [words[index % count] for index in range(replicas)]
