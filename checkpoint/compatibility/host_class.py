"""Name the kind of host that a snapshot was taken on, so that a store keeps one snapshot of a launch for each kind.

A launch's name says nothing of the host: most hosts restore each other's snapshots. Those of two node pools that do not (other
processors, another GPU driver) would replace each other's in a store, without end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import blake3
import msgspec

from checkpoint.compatibility.check import IGNORED_CPU_FLAGS, Identity, check_host, refuse
from checkpoint.compatibility.gpu import Gpu, kernel_driver
from checkpoint.compatibility.host import HostFacts
from checkpoint.errors import CheckpointError
from checkpoint.snapshot import manifest


def host_class(host: HostFacts) -> str:
    """Return a name such as `x86_64-6.1-9f3a21bc`: machine, kernel, and a digest of all else that `check_host` compares.

    CRIU's version is left out: it belongs to the image, and a launch does not know it everywhere.
    """
    kernel = re.match(r"\d+\.\d+", host.kernel)
    compared = [
        host.page_size,
        sorted(set(host.cpu_flags) - IGNORED_CPU_FLAGS),
        [[gpu.name, gpu.memory >> 30] for gpu in host.gpus],
        host.driver,
    ]
    digest = blake3.blake3(b"quickthaw host class 1\0" + msgspec.json.encode(compared)).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', host.machine)}-{kernel[0] if kernel else '0'}-{digest}"


def class_of(identity: Mapping[str, Any]) -> str:
    """Return the class of the host that a snapshot was taken on, "" if its manifest's `identity` does not say."""
    try:
        return host_class(Identity.decode(identity).host)
    except CheckpointError:
        return ""


def as_seen(host: HostFacts, then: HostFacts) -> HostFacts:
    """Return a host with what matters to a restore, and not to a pull, taken from the snapshot's: CRIU, and GPUs where none is visible.

    The kernel's GPU driver is compared even then. A restore compares all, and says itself what is missing.
    """
    here = msgspec.structs.replace(host, criu=then.criu)
    if not host.gpus and then.gpus:
        here = msgspec.structs.replace(here, gpus=then.gpus, driver=kernel_driver() or then.driver)
    return here


def _fitting(gpus: tuple[Gpu, ...], then: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Return those GPUs that can take the place of the snapshot's, in their order; all if they do not suffice, or it has none."""
    left, found = list(gpus), []
    for was in then:
        one = next((gpu for gpu in left if gpu.name == was.name and gpu.memory >= was.memory), None)
        if one is None:
            return gpus
        left.remove(one)
        found.append(one)
    return tuple(found) or gpus


def accepts(host: HostFacts, name: str) -> Callable[[bytes, bytes | None], None]:
    """Return what raises Incompatible for the manifest of a snapshot `name` that a host may not restore, whatever launch wants it.

    What a container that fetches for others does not see is not compared (`as_seen`). Of more GPUs than the snapshot has, a launch
    may make some visible: those that fit are compared.
    """

    def check(document: bytes, _: bytes | None) -> None:
        recorded = manifest.parse(document, Path(name), name).identity
        if recorded:  # else of no engine
            then = Identity.decode(recorded)
            here = as_seen(host, then.host)
            refuse(check_host(then, msgspec.structs.replace(here, gpus=_fitting(here.gpus, then.host.gpus))))

    return check
