"""The SGLang plugin (entry-point group sglang.srt.plugins): loaded in the launcher, the scheduler and the detokenizer.

SGLang has no call into a scheduler by name, so trimming is a hook on `/flush_cache`. That empties the radix cache; once
it has succeeded, the KV pool holds nothing of use and its pages are dropped.
"""

import json

from . import control, joining, memory

_named = False  # True once the weights' areas were reported to the launcher


def _after_flush(result, scheduler, *args, **kwargs):
    if result:
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        dropped = memory.discard(memory.tensors_in(pool))
        _name_weights(scheduler)
        if control.excludes_weights():
            control.answer("weights", str(memory.drop_weights(scheduler.tp_worker.model_runner.model)))
        memory.trim()
        control.answer("kv", str(dropped))
    return result


def _name_weights(scheduler):
    """Report the weights' areas to the launcher, so that restores map them."""
    global _named
    model = scheduler.tp_worker.model_runner.model
    control.answer("areas", json.dumps(memory.areas(parameter.data for parameter in model.parameters())))
    _named = True


def _after_ingest(result, scheduler, *args, **kwargs):
    """Report the weights at the first canary, and let a canary wait for the request that joins it.

    The first canary comes before a snapshot. That snapshot may keep the KV cache, in which case no flush would report
    the weights.
    """
    if result and not _named and any("quickthaw-canary" in str(getattr(one, "rid", None)) for one in result):
        _name_weights(scheduler)
    if result and scheduler.tp_size == 1 and joining.wanted(getattr(one, "rid", None) for one in result):
        joining.wait(lambda: result.extend(scheduler.ingest_requests() or ()) or len(result) > 1)
    return result


def _after_overlap_choice(result, scheduler, batch=None, last_batch=None, *args, **kwargs):
    """Process the first result of an engine that was just woken before the next step, instead of after it.

    SGLang computes a step before it processes the previous one's result, which hides CPU work behind the GPU's. On a
    CPU, both are CPU work, and the client that waited for the restore would wait for one more step.
    """
    if not control.fresh or batch is None or last_batch is None:
        return result
    control.fresh = False
    return result or str(scheduler.device) == "cpu"


def register():
    """Install the hooks. SGLang calls this in each of its processes before it starts serving."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    control.install()
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}.flush_cache", _after_flush, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.ingest_requests", _after_ingest, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.is_disable_overlap_for_batch", _after_overlap_choice, HookType.AFTER)
