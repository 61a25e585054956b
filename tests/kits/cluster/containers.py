"""Pods that are containers of podman: an image of deploy/container with the engine's double, on the rig's state folder as the node's."""

import asyncio

from tests.kits.cluster.nodes import PORT, Processes
from tests.kits.container_kit import LEAST
from tests.kits.image_kit import IMAGE


class Containers(Processes):
    """One container for each pod; `text` is what they said."""

    def __init__(self, images, rig):
        super().__init__(rig.folder)
        self.images, self.rig = images, rig
        self.log = rig.folder / "containers.log"

    async def start(self, pod, address):
        """Start podman with the pod's container, and return its process."""
        rig = self.rig
        volumes = (f"--volume={rig.home}:/var/lib/quickthaw", f"--volume={rig.model}:{rig.model}:ro")
        env = {**rig.watch.environment, "QUICKTHAW_SHARED_STEP": "1"}
        given = ("--network=host", *volumes, *(f"--env={name}={value}" for name, value in env.items()), *LEAST)
        words = (IMAGE, str(rig.model), "--host", address, "--port", str(PORT))
        with self.log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *self.images.run_argv(*given, *self.images.volumes, *words),
                stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        self.running[pod["metadata"]["name"]] = process
        return process

    def text(self):
        return self.log.read_text(errors="replace")
