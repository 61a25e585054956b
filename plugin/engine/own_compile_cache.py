"""Begin a first start with what vLLM alone has compiled and learnt on this host.

quickthaw gives an engine a cache folder of its own, which snapshots and stores can carry. vLLM alone keeps its caches in
the user's folder, and would start from those: without a copy, the first start through quickthaw would do again what is
done already. Only vLLM knows the keys of its AOT artefacts, so these are copied where vLLM computes them.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile

COMPILED = "inductor_cache"
"""Inductor's own cache, beside the artefact: content-addressed, and all that vLLM alone loads on a CPU."""


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
    try:
        for name in names:
            place = os.path.join(target, name)
            if name.endswith(".json") and not os.path.exists(place):
                os.makedirs(target, exist_ok=True)
                new = f"{place}.{os.getpid()}"
                try:
                    shutil.copyfile(os.path.join(source, name), new)
                    os.replace(new, place)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(new)
                    raise
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
    new = None
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        new = tempfile.mkdtemp(prefix=".", dir=os.path.dirname(target))
        if alone == ours:
            shutil.copytree(source, new, dirs_exist_ok=True)
        else:
            shutil.copytree(os.path.join(source, COMPILED), os.path.join(new, COMPILED))
        os.chmod(new, 0o755)
        os.rename(new, target)
    except OSError as error:
        if new:
            shutil.rmtree(new, ignore_errors=True)
        if not os.path.exists(target):  # else another rank was first
            _report(error)


def _report(error):
    sys.stderr.write(
        f"quickthaw: own-cache-unused: what vLLM alone has compiled is not used: {error}; vLLM compiles it again\n"
    )
