"""The vLLM plugin (entry-point group vllm.general_plugins): loaded in the API server, the engine core and every worker.

It adds four methods to the workers, called through vLLM's own `/collective_rpc`. `quickthaw_drop_cache` drops the KV
cache's pages; `quickthaw_trim` also reports the weights' areas and trims the process; `quickthaw_name_weights` only
reports them; `quickthaw_reload_weights` takes the weights from the launcher's ring, else from vLLM's own reload. The plugin may
be loaded more than once in a process, as vLLM's contract requires.
"""

import contextlib
import functools
import json
import os
import sys

from . import control, joining, memory, own_compile_cache, packed_weights, weights


def _drop_cache(self):
    """Drop the KV cache's pages in this worker and return the bytes dropped. The prefix cache has been reset by then."""
    runner = getattr(self, "worker", self).model_runner
    return memory.discard(_flat(getattr(runner, "kv_caches", ())))


def _trim(self):
    """Drop what a snapshot need not hold and return the bytes of KV cache dropped."""
    runner = getattr(self, "worker", self).model_runner
    dropped = _drop_cache(self)
    _name_weights(self)
    folders = control.model_folders()
    if folders is not None:
        weights.record(_models(runner), folders + _draft_folders(self))
        control.answer("weights", str(memory.drop_weights(runner.get_model())))
    memory.trim()
    control.answer("kv", str(dropped))
    return dropped


def _models(runner):
    """Return all models of a worker: the main one, and the draft of speculative decoding."""
    draft = getattr(runner, "get_draft_model", lambda: None)()
    return [runner.get_model()] + ([draft] if draft is not None else [])


def _draft_folders(self):
    """Return the folder of the draft model, if there is one on this host."""
    speculative = getattr(getattr(getattr(self, "worker", self), "vllm_config", None), "speculative_config", None)
    folder = getattr(getattr(speculative, "draft_model_config", None), "model", None)
    return [folder] if isinstance(folder, str) and os.path.exists(folder) else []


def _reload_weights(self):
    """Fill the weights of all models from the launcher's ring. If that fails, reload them as vLLM alone does."""
    worker = getattr(self, "worker", self)
    if not weights.refill(_models(worker.model_runner)):
        worker.reload_weights()
        return
    for name in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):  # as vLLM's own reload does
        getattr(worker.model_runner, name, lambda: None)()


def _name_weights(self):
    """Report this worker's weight areas to the launcher, so that restores map them."""
    model = getattr(self, "worker", self).model_runner.get_model()
    try:
        spans, tensors = packed_weights.weights(model)
    except Exception as error:  # noqa: BLE001 - other vLLM versions' layers may hold anything; without areas a restore is only slower
        sys.stderr.write(
            f"quickthaw: packed-weights-unknown: the search for packed weights failed: {error!r}; restores are slower\n"
        )
        spans, tensors = [], []
    tensors += [parameter.data for parameter in model.parameters()]
    control.answer("areas", json.dumps(memory.areas(tensors, spans)))


def _flat(tensors):
    for item in tensors:
        if isinstance(item, (list, tuple)):
            yield from _flat(item)
        elif item is not None:
            yield item


def _join(process_input_queue):
    """Wrap the engine core's queue function: let a canary wait for the request that joins it."""

    @functools.wraps(process_input_queue)
    def joined(self):
        process_input_queue(self)
        if joining.wanted(request.request_id for request in getattr(self.scheduler, "waiting", ())):
            joining.wait(lambda: not self.input_queue.empty())
            process_input_queue(self)

    return joined


def _finalizable(load):
    """Wrap torch.compiler.load_compiled_function: give every loaded function a `finalize_loading` method.

    vLLM calls that method on what it loads, but only functions compiled by its own backend have it. Without it, vLLM
    would refuse functions that Inductor compiled directly, as on a CPU, and compile them again at every start.
    """

    @functools.wraps(load)
    def loaded(*arguments, **options):
        found = load(*arguments, **options)
        with contextlib.suppress(AttributeError):  # another PyTorch: vLLM compiles again, as it would alone
            compiled = found._artifacts.compiled_fn
            if not hasattr(compiled, "finalize_loading"):
                compiled.finalize_loading = lambda vllm_config: None
        return found

    return loaded


def _with_processor(factors_of):
    """Wrap vLLM's list of factors in an AOT artefact's hash: on a CPU, add the CPU's features and the number of threads.

    Inductor compiles for the present CPU (-march=native) and thread count. vLLM's list has neither, and code for
    another CPU would end the engine by SIGILL. The list takes over what vLLM alone has compiled (own_compile_cache.py).
    """

    @functools.wraps(factors_of)
    def factors(vllm_config):
        found = factors_of(vllm_config)
        if vllm_config.device_config.device_type != "cpu":
            return own_compile_cache.Factors(found)
        import torch

        return own_compile_cache.Factors(found, (_processor_flags(), torch.get_num_threads()))

    return factors


def _processor_flags():
    """Return the features of the first processor, as the kernel lists them."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))), "")


def register():
    """Install the hooks. vLLM calls this in each of its processes."""
    from vllm.v1.worker.worker_base import WorkerBase

    control.install()
    own_compile_cache.take_over_model_infos()
    WorkerBase.quickthaw_drop_cache = _drop_cache
    WorkerBase.quickthaw_trim = _trim
    WorkerBase.quickthaw_name_weights = _name_weights
    WorkerBase.quickthaw_return_memory = lambda self: memory.return_host_memory()
    WorkerBase.quickthaw_reload_weights = _reload_weights
    with contextlib.suppress(ImportError, AttributeError):
        import torch.compiler
        from vllm.compilation import caching

        # Never patch the loader without the hash: vLLM must not load code that was compiled for another CPU.
        if not hasattr(caching.aot_compile_hash_factors, "__wrapped__"):
            caching.aot_compile_hash_factors = _with_processor(caching.aot_compile_hash_factors)
            torch.compiler.load_compiled_function = _finalizable(torch.compiler.load_compiled_function)
    # This is internal to vLLM and only affects speed: a version without this method runs the canary alone.
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.v1.engine.core import EngineCoreProc

        if not hasattr(EngineCoreProc._process_input_queue, "__wrapped__"):
            EngineCoreProc._process_input_queue = _join(EngineCoreProc._process_input_queue)
