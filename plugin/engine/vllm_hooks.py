"""The vLLM plugin (entry-point group vllm.general_plugins): loaded in the API server, the engine core and every worker.

Adds two methods to the workers, called through vLLM's own `/collective_rpc`: `quickthaw_shrink` drops the KV cache's pages, and says where
the weights lie; `quickthaw_name_weights` only says that.
May be loaded more than once in a process, as vLLM's contract asks.
"""

import contextlib
import functools
import json
import sys

from . import control, joining, memory, packed


def _shrink(self):
    """Drop the KV cache's pages in this worker; the prefix cache has been reset by then. Returns the bytes dropped."""
    runner = getattr(self, "worker", self).model_runner
    dropped = memory.discard(_flat(getattr(runner, "kv_caches", ())))
    _name_weights(self)
    if control.thin():
        control.answer("weights", str(memory.drop_weights(runner.get_model())))
    memory.trim()
    control.answer("kv", str(dropped))
    return dropped


def _name_weights(self):
    """Say where this worker's weights lie, so that restores map them."""
    model = getattr(self, "worker", self).model_runner.get_model()
    try:
        spans, tensors = packed.weights(model)
    except Exception as error:  # noqa: BLE001 - another vLLM's layers may hold anything; not to know where costs a restore time, no more
        sys.stderr.write(f"quickthaw: packed weights were not looked for: {error!r}\n")
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
    """Around the engine core's: a canary waits a moment for the request that comes with it."""

    @functools.wraps(process_input_queue)
    def joined(self):
        process_input_queue(self)
        if joining.wanted(request.request_id for request in getattr(self.scheduler, "waiting", ())):
            joining.wait(lambda: not self.input_queue.empty())
            process_input_queue(self)

    return joined


def _finalizable(load):
    """Around torch.compiler.load_compiled_function. vLLM calls `finalize_loading` on what was loaded, which only what its own backend
    compiled has: what Inductor compiled directly, as on a CPU, would be refused and compiled again at every start."""

    @functools.wraps(load)
    def loaded(*arguments, **options):
        found = load(*arguments, **options)
        with contextlib.suppress(AttributeError):  # another PyTorch: vLLM compiles again, as it does alone
            compiled = found._artifacts.compiled_fn
            if not hasattr(compiled, "finalize_loading"):
                compiled.finalize_loading = lambda vllm_config: None
        return found

    return loaded


def _for_this_processor(factors_of):
    """Around vLLM's list of what names an AOT artefact. On a CPU, Inductor compiles for this very processor (-march=native) and this number
    of threads; neither is in vLLM's list, and code for another processor would end the engine by SIGILL."""

    @functools.wraps(factors_of)
    def factors(vllm_config):
        found = factors_of(vllm_config)
        if vllm_config.device_config.device_type != "cpu":
            return found
        import torch

        return [*found, _processor_flags(), torch.get_num_threads()]

    return factors


def _processor_flags():
    """The features of the first processor, as the kernel lists them."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))), "")


def register():
    """Called by vLLM in each of its processes."""
    from vllm.v1.worker.worker_base import WorkerBase

    control.install()
    WorkerBase.quickthaw_shrink = _shrink
    WorkerBase.quickthaw_name_weights = _name_weights
    with contextlib.suppress(ImportError, AttributeError):
        import torch.compiler
        from vllm.compilation import caching

        # Never the first without the second: what vLLM refuses to load cannot be for another processor.
        if not hasattr(caching.aot_compile_hash_factors, "__wrapped__"):
            caching.aot_compile_hash_factors = _for_this_processor(caching.aot_compile_hash_factors)
            torch.compiler.load_compiled_function = _finalizable(torch.compiler.load_compiled_function)
    # Inside of vLLM, and only about time: one that has it elsewhere begins with the canary alone.
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.v1.engine.core import EngineCoreProc

        if not hasattr(EngineCoreProc._process_input_queue, "__wrapped__"):
            EngineCoreProc._process_input_queue = _join(EngineCoreProc._process_input_queue)
