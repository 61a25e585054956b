"""Give each replica of a launch its own GPU: one engine per GPU, all from one snapshot, taken on the first."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from checkpoint.compatibility.gpu import gpu_facts, select_visible
from checkpoint.cuda.checkpoint import PARALLEL_FLAGS
from checkpoint.cuda.placement import places
from checkpoint.errors import HostLacks
from launchers.given_options import given_options, last
from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
VISIBLE = "CUDA_VISIBLE_DEVICES"
_SHARE = {"vllm": "--gpu-memory-utilization", "sglang": "--mem-fraction-static"}
"""By engine, the option that bounds its part of a GPU's memory."""


def settings_by_replica(settings: LaunchSettings) -> list[LaunchSettings]:
    """Return the settings of each replica: on a host with several GPUs, and where an engine uses one, each has its own.

    The user's CUDA_VISIBLE_DEVICES says between which. Log a line where several replicas share a GPU.
    """
    alone = [settings] * settings.replicas
    if settings.replicas < 2 or _parallel(settings):
        return alone
    visible = settings.given_environment.get(VISIBLE)
    try:
        gpus, _ = gpu_facts(_without_choice(settings.environment))
    except HostLacks as error:
        log.info("every replica sees the same GPUs: %s", error)
        return alone
    count = len(select_visible(gpus, visible))
    if 0 < count < settings.replicas:
        log.warning(
            "replicas-share-gpu: %d replicas on %d GPU%s; bound the memory of each with %s, or lower --replicas",
            settings.replicas,
            count,
            "s" if count > 1 else "",
            _SHARE.get(settings.engine, "the engine's own option"),
        )
    return [
        settings if place is None else replace(settings, environment={**settings.environment, VISIBLE: place})
        for place in places(gpus, visible, settings.replicas)
    ]


def chosen_gpu(settings: LaunchSettings) -> dict[str, str]:
    """Return the variable by which another process sees the GPUs that a replica with these settings sees; empty if all."""
    return {VISIBLE: settings.environment[VISIBLE]} if VISIBLE in settings.environment else {}


def _without_choice(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != VISIBLE}


def _parallel(settings: LaunchSettings) -> bool:
    """Return whether one engine of this launch uses several GPUs, by its command line or the file that it names."""
    options = given_options(settings.command.arguments)
    return any(last(options, flag) not in ("", "0", "1") for flag in PARALLEL_FLAGS)
