"""Begin a first start with what vLLM alone has compiled and learnt on this host.

quickthaw gives an engine a cache folder of its own, which snapshots and stores can carry. vLLM alone keeps its caches in
the user's folder, and would start from those: without a copy, the first start through quickthaw would do again what is
done already. Only vLLM knows the keys of its AOT artefacts, so these are copied where vLLM computes them.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile

COMPILED = "inductor_cache"
"""Inductor's own cache, beside the artefact: content-addressed, and all that vLLM alone loads on a CPU."""
_STAGING = ".quickthaw-copy-"


class Factors(list[object]):
    """vLLM's list of factors of an AOT artefact's key, to which vLLM appends one more: the key is the digest of its text.

    `extra` are the factors that we add to vLLM's own. Before vLLM looks for the artefact, what vLLM alone has compiled is
    copied to its place.
    """

    def __init__(self, own, extra=()):
        super().__init__([*own, *extra])
        self.own = list(own)

    def append(self, factor):
        super().append(factor)
        self.own.append(factor)
        take_over(_key(self.own), _key(list(self)))


def _key(factors):
    return hashlib.sha256(str(factors).encode()).hexdigest()


def usual_root():
    """Return the folder of vLLM's caches when no variable names another (vllm/envs.py)."""
    home = os.getenv("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    return os.path.join(home, "vllm")


def current_root():
    """Return the folder of vLLM's caches, if it is quickthaw's and not one that the user has chosen, else ""."""
    return os.environ.get("VLLM_CACHE_ROOT", "") if os.environ.get("QUICKTHAW_TAKE_OVER_CACHE") == "1" else ""


def take_over_model_infos():
    """Copy what vLLM alone knows of model classes, a small file each, unless it is there; to find it out takes ten seconds.

    Each file names the digest of the code that it describes.
    """
    source, target = os.path.join(usual_root(), "modelinfos"), os.path.join(current_root(), "modelinfos")
    if not current_root():
        return
    try:
        names = os.listdir(source)
    except OSError:
        return  # vLLM alone has not run here
    names = [name for name in names if name.endswith(".json") and not os.path.exists(os.path.join(target, name))]
    if not names:
        return
    try:
        with _staging(target) as new:
            for name in names:
                shutil.copyfile(os.path.join(source, name), os.path.join(new, name))
                os.replace(os.path.join(new, name), os.path.join(target, name))
    except OSError as error:
        _report(error)


def take_over(alone, ours):
    """Copy the artefact `alone` of vLLM's usual cache as `ours` of the cache in use, unless there is one.

    Where the keys differ, the artefact itself stays behind: it may be code for another processor. Complete or not there.
    Errors cost the time to compile, and are reported on standard error.
    """
    place = os.path.join("torch_compile_cache", "torch_aot_compile")
    source = os.path.join(usual_root(), place, alone)
    target = os.path.join(current_root(), place, ours)
    if not current_root() or os.path.exists(target) or not os.path.isdir(os.path.join(source, COMPILED)):
        return
    try:
        with _staging(os.path.dirname(target)) as staging:
            new = os.path.join(staging, ours)
            if alone == ours:
                shutil.copytree(source, new)
            else:
                shutil.copytree(os.path.join(source, COMPILED), os.path.join(new, COMPILED))
            os.rename(new, target)
    except OSError as error:
        if not os.path.exists(target):  # else another rank was first
            _report(error)


@contextlib.contextmanager
def _staging(parent):
    """Make a folder in `parent` for what is being copied, locked and removed at the end; remove what killed copies left. Raises OSError.

    The kernel releases a lock however its owner ends, while process numbers of two sandboxes say nothing of each other.
    """
    os.makedirs(parent, exist_ok=True)
    for name in os.listdir(parent):
        if name.startswith(_STAGING):
            with contextlib.suppress(OSError), _locked(os.path.join(parent, name)) as old:
                shutil.rmtree(old, ignore_errors=True)
    with _locked(tempfile.mkdtemp(prefix=_STAGING, dir=parent)) as new:
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder):
    """Lock a folder. Raises OSError, also if another process has the lock, or has removed the folder meanwhile."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
        yield folder
    finally:
        os.close(fd)


def _report(error):
    sys.stderr.write(
        f"quickthaw: own-cache-unused: what vLLM alone has compiled is not used: {error}; vLLM compiles it again\n"
    )
