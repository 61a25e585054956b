"""copy-into: /opt/quickthaw in a volume, used by a container of another image, which has its own Python."""

import sys

import pytest

from launchers.bare import free_port
from tests.kits.container_kit import LEAST, skeleton

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("image"), pytest.mark.timeout(300)]

COPY = ("--entrypoint=/opt/quickthaw/bin/copy-into",)


@pytest.fixture(scope="module")
def copy(images, tmp_path_factory):
    """Return the folder of a volume with the copy."""
    folder = tmp_path_factory.mktemp("volume")
    for _ in range(2):  # an init container may run twice
        images.output("/copy", options=(*COPY, f"--volume={folder}:/copy"))
    return folder


@pytest.fixture
def volume(copy):
    """Return the option that mounts the volume at /copy."""
    return f"--volume={copy}:/copy"


def test_an_untouched_image_serves_and_restores_with_the_copy(images, launch_rig, volume):
    port = free_port()
    words = ["launch", "--", "vllm", "serve", launch_rig.model, "--host", "127.0.0.1", "--port", port]
    options = (volume, *LEAST, "--entrypoint=/copy/bin/quickthaw", "--volume=/dev/null:/opt/quickthaw/bin/quickthaw")
    with images.serving(launch_rig, *words, options=options, port=port) as started:
        answer = started.ask()
        started.wait_serving()
        assert started.off() == {}, started.ours()
    with images.serving(launch_rig, *words, options=options, port=port) as started:
        assert started.ask() == answer
        assert started.phases()[0][:2] == ["mounting", "restoring"]


@pytest.mark.skipif(sys.base_prefix.startswith("/usr"), reason="this Python is the host's own")
def test_it_takes_the_python_of_the_container(images, copy, volume, tmp_path):
    """The image's own is not there; the host's /usr has one of the same version."""
    argv = ["--network=none", "--volume=/usr:/usr:ro", volume, "--env=PATH=/usr/bin:/bin"]
    argv += ["--rootfs", str(skeleton(tmp_path / "other")), "/copy/bin/quickthaw"]
    said = images.finished(images.run_argv(*argv, "doctor", "--help"))
    assert said.startswith("Usage: quickthaw doctor")
    assert (copy / "bin" / "python").readlink().is_relative_to("/usr")
    assert (copy / ".verified").read_text().startswith("/usr/bin/python3")
    said = images.finished(images.run_argv(*argv, "launch", "--", "sh", "-c", "exit 5"), code=5)
    assert said.startswith("quickthaw: run-as-given: ")


def test_a_copy_that_cannot_be_used_lets_the_engine_start_alone(images, copy, volume):
    (packages,) = (copy / "lib").glob("python3*")
    (copy / ".verified").unlink(missing_ok=True)
    packages.rename(copy / "lib" / "python3.99")
    words = ("launch", "--", "vllm", "serve", "--no-such")
    said = images.output(*words, options=(volume, "--entrypoint=/copy/bin/quickthaw"), code=1)
    (copy / "lib" / "python3.99").rename(packages)
    assert said.startswith("quickthaw: run-as-given: this container's PATH has none of the versions of Python"), said
    assert "the engine starts alone" in said.splitlines()[0] and "Traceback" in said


@pytest.mark.parametrize("place", ["/nowhere", "/copy"])
def test_a_copy_that_fails_says_so(images, tmp_path, place):
    options = ("--tmpfs=/copy:rw,size=20m",)
    said = images.output(place, options=(*COPY, *options), code=1)
    assert said.splitlines()[-1].startswith("quickthaw: image-copy: "), said
