"""Fixtures of the tests with real mounts: a state folder, a rig that unmounts everything, a store with injected faults."""

from __future__ import annotations

import pytest

from lazyfs.api import import_directory
from tests.kits.lazyfs import faulty_store
from tests.kits.lazyfs.rig import SIZES, Rig, write_model


@pytest.fixture(autouse=True, scope="session")
def unbounded():
    """Bound no cache by the free space of the machine that runs the tests; those of the bound set their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKTHAW_CACHE_LIMIT", "none")
        yield


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUICKTHAW_STORE", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """Return a folder for a whole module, with `home` in it as the state folder."""
    folder = tmp_path_factory.mktemp("lazyfs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKTHAW_HOME", str(folder / "home"))
        patch.delenv("QUICKTHAW_STORE", raising=False)
        yield folder


@pytest.fixture(scope="module")
def shared(module_folder):
    """Return one model and its digest for the module; importing is tested elsewhere."""
    model = write_model(module_folder / "model", SIZES)
    return model, import_directory(model)


@pytest.fixture(scope="module")
def stored(module_folder):
    """Return a model, its digest, and the store into which it was imported."""
    model = write_model(module_folder / "stored", [5 << 20, 1000, 4 << 20, 6 << 20])
    return model, import_directory(model), module_folder / "home" / "store"


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def faulty(monkeypatch):
    """Register faulty:// URLs with daemons and fetchers."""
    monkeypatch.setenv("PYTHONPATH", faulty_store.PYTHONPATH)


@pytest.fixture
def control(tmp_path, stored, faulty):
    """Return a function that sets the fault of a store while a mount uses it."""
    path = tmp_path / "control.json"

    def set_fault(fault=None, **values):
        faulty_store.set_fault(path, stored[2], fault, **{"only": "chunks/", **values})

    set_fault()
    set_fault.url = f"faulty://{path}"
    return set_fault
