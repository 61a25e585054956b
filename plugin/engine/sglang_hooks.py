"""The SGLang plugin (entry-point group sglang.srt.plugins): loaded in the launcher, the scheduler and the detokenizer.

SGLang has no way to call into a scheduler by name, so shrinking hangs on what it does have: `/flush_cache` empties the radix cache, and
after it has succeeded the KV pool holds nothing, so its pages are dropped.
"""

import json

from . import control, memory


def _after_flush(result, scheduler, *args, **kwargs):
    if result:
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        dropped = memory.discard(memory.tensors_in(pool))
        model = scheduler.tp_worker.model_runner.model
        control.answer("areas", json.dumps(memory.areas(parameter.data for parameter in model.parameters())))
        if control.thin():
            control.answer("weights", str(memory.drop_weights(model)))
        memory.trim()
        control.answer("kv", str(dropped))
    return result


def register():
    """Called by SGLang in each of its processes, before it starts serving."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    control.install()
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.flush_cache", _after_flush, HookType.AFTER)
