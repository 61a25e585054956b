"""Identify this host without starting a process: kernel, CPU and memory page size."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from checkpoint.compatibility.gpu import Gpu, gpu_facts


class HostFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine.

    `cpu_flags` are those of CPU 0 as listed by the kernel; `criu` is "" if its version was not requested.
    """

    kernel: str
    machine: str
    page_size: int
    cpu_model: str
    cpu_flags: tuple[str, ...]
    cpus: int
    criu: str = ""
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""


def host_facts(
    criu: str = "",
    gpus: tuple[Gpu, ...] | None = None,
    environment: Mapping[str, str] | None = None,
) -> HostFacts:
    """Identify this machine.

    `criu`: CRIU's version, if known. `gpus`: those of this host; by default NVML is queried. `environment`: the engine's,
    which decides which GPUs it sees. Raises HostLacks if there is an NVIDIA driver but NVML does not answer.
    """
    uname = os.uname()
    model, flags = _cpu()
    driver = ""
    if gpus is None:
        gpus, driver = gpu_facts(environment)
    return HostFacts(
        kernel=uname.release,
        machine=uname.machine,
        page_size=os.sysconf("SC_PAGE_SIZE"),
        cpu_model=model,
        cpu_flags=flags,
        cpus=len(os.sched_getaffinity(0)),
        criu=criu,
        gpus=gpus,
        driver=driver,
    )


def cpu_flags() -> tuple[str, ...]:
    """Return the features of CPU 0 as listed by the kernel."""
    return _cpu()[1]


def _cpu() -> tuple[str, tuple[str, ...]]:
    # /proc/cpuinfo has one block per CPU. Read only the first: all of it takes milliseconds on 200 cores.
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        model, flags = "", ""
        for line in file:
            name, _, value = line.partition(":")
            name = name.strip()
            if name in ("model name", "CPU part"):
                model = value.strip()
            elif name in ("flags", "Features"):
                flags = value
            elif not name and flags:
                break
    return model, tuple(sorted(set(flags.split())))
