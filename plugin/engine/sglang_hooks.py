"""The SGLang plugin (entry-point group sglang.srt.plugins): loaded in the launcher, the scheduler and the detokenizer.

SGLang has no call into a scheduler by name, so trimming is a hook on `/flush_cache`. That empties the radix cache; once
it has succeeded, the KV pool holds nothing of use and its pages are dropped.
"""

import json
import os

from . import control, joining, memory, weights

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
"""Module of what serves `/update_weights_from_disk` in a scheduler of the tested release; where it is not, SGLang's own update is used."""
_named = False  # True once the weights' areas were reported to the launcher


def _after_flush(result, scheduler, *args, **kwargs):
    if result:
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        dropped = memory.discard(memory.tensors_in(pool))
        _name_weights(scheduler)
        folders = control.model_folders()
        if folders is not None:
            draft = getattr(getattr(scheduler, "server_args", None), "speculative_draft_model_path", None)
            weights.record(_models(scheduler), folders + ([draft] if draft and os.path.exists(draft) else []))
            control.answer("weights", str(memory.drop_weights(scheduler.tp_worker.model_runner.model)))
        memory.trim()
        control.answer("kv", str(dropped))
    return result


def _models(holder):
    """Return the models of a scheduler or of its weight updater: the main one, and the drafts of speculative decoding."""
    runners_of = getattr(getattr(holder, "draft_worker", None), "weight_update_runners", list)
    return [holder.tp_worker.model_runner.model, *(runner.model for _, runner in runners_of())]


def _around_update(original, updater, request, *args, **kwargs):
    """Fill the weights from the launcher's ring, if it offers one. If that fails, update them as SGLang alone does."""
    if not (weights.offered() and weights.refill(_models(updater))):
        return original(updater, request, *args, **kwargs)
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput

    return UpdateWeightFromDiskReqOutput(success=True, message="Filled by quickthaw.", num_paused_requests=0)


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


def _source(module, default=""):
    """Return the source of a module of SGLang without importing it, or `default` if there is none."""
    import sglang

    try:
        with open(os.path.join(os.path.dirname(sglang.__file__), *module.split(".")[1:]) + ".py", "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return default


def register():
    """Install the hooks. SGLang calls this in each of its processes before it starts serving."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    control.install()
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}.flush_cache", _after_flush, HookType.AFTER)
    for method, hook in (("ingest_requests", _after_ingest), ("is_disable_overlap_for_batch", _after_overlap_choice)):
        # Older releases lack one (0.5.17 the first): a start is then as fast as theirs, and a hook on it only a traceback.
        if f"def {method}(" in _source(scheduler.rpartition(".")[0], f"def {method}("):
            HookRegistry.register(f"{scheduler}.{method}", hook, HookType.AFTER)
    if _source(_UPDATER, None) is not None:
        target = f"{_UPDATER}.SchedulerWeightUpdaterManager.update_weights_from_disk"
        HookRegistry.register(target, _around_update, HookType.AROUND)
