"""The image of deploy/container, built once for all tests."""

import pytest

from tests.kits.image_kit import wheels
from tests.kits.pod_kit import Pods


@pytest.fixture(scope="session")
def context(tmp_path_factory):
    """Return a build's context: the wheels, and deploy/."""
    return wheels(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="session")
def images(double, context):
    """Return podman with the image IMAGE, whose engine is vLLM."""
    made = Pods(double)
    try:
        made.build(context, ENGINE="vllm")
        yield made
    finally:
        made.close()
